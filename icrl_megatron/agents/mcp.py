"""The tools of an MCP server (modelcontextprotocol.io), over stdio or streamable HTTP, by the official package `mcp`.

    server = McpServer(["mcp-server-time", "--local-timezone", "UTC"])
    toolbox = Toolbox(server.tools(), ToolLimits())

A server has one connection for each process, on an event loop in a thread of its own: rollouts use a new event loop for
each step, and a stdio server lives as long as the run.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import re
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from icrl_megatron.agents import schemas
from icrl_megatron.agents.text import head, plain
from icrl_megatron.agents.tools import Arguments, ToolFailure, ToolSpec, ToolUseError
from icrl_megatron.utils import addresses
from icrl_megatron.utils.errors import ConfigError

NO_TEXT = "The tool answered no text."
PAUSE_S = 5.0
"""After a connection could not be opened, calls fail at once for this time."""
MOST_PAGES = 100
"""Of a server's list of tools."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class McpLimits:
    start_s: float = 30.0
    """Seconds to start or reach a server and to list its tools."""
    call_s: float = 50.0
    """Seconds of one call. Keep `ToolLimits.call_s` above it."""
    answer_chars: int = 8_000
    """Of an answer; the rest is left out, which is marked."""
    message_bytes: int = 4 << 20
    """Of one message of the server; a longer one ends the connection, and the calls in flight fail."""


@dataclass(eq=False)
class _Link:
    """One connection, and the calls that use it."""

    client: Any
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    calls: int = 0
    answered_at: float = 0.0
    """Event loop time of its last answer."""
    retired: bool = False
    """No new calls. It is closed after its last call."""

    def retire(self) -> None:
        self.retired = True
        if not self.calls:
            self.stop.set()


class McpServer:
    """One server: a command that is started, or the address of a streamable HTTP endpoint."""

    def __init__(
        self,
        server: Sequence[str] | str,
        limits: McpLimits | None = None,
        prefix: str = "",
        environment: Mapping[str, str] | None = None,
        version: str = "",
    ) -> None:
        """`prefix` is put before the names of its tools, for servers whose tools have the same names. `environment` is
        added to the few variables that a command inherits (PATH, HOME and the like). `version`: see `ToolSpec`.

        Raises ConfigError if the package is missing.
        """
        try:
            import mcp.client  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"MCP tools need the package mcp, version 2 ({error}): pip install 'icrl-megatron[mcp]'"
            ) from error
        self._server, self._limits, self._prefix = server, limits or McpLimits(), prefix
        self._environment, self._version = dict(environment or {}), version
        self._errors = bytearray()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._link: _Link | None = None
        self._holders: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()
        self._not_before = 0.0
        self._thread.start()
        atexit.register(self.close)

    def _named(self, problem: str) -> str:
        """A message about the server, without the keys that it was given."""
        if isinstance(self._server, str):
            shown = addresses.shown(self._server)
            problem, keys = problem.replace(self._server, shown), addresses.secrets(self._server)
        else:
            shown, keys = repr(" ".join(self._server)), tuple(self._environment.values())
        return f"MCP server {shown}: {addresses.hidden(problem, *keys)}"

    def tools(self) -> list[McpTool]:
        """The server's tools. Raises ConfigError if it cannot be started or reached, or lists no valid tools."""
        try:
            return [
                McpTool(self, spec.name, replace(spec, name=self._prefix + spec.name, version=self._version))
                for spec in self._submit(self._listed()).result()
            ]
        except ConfigError:
            self.close()
            raise
        except ToolFailure as error:
            self.close()
            wrote = self._errors.decode(errors="replace")
            said = plain(addresses.hidden(wrote, *self._environment.values())).strip()
            raise ConfigError(
                f"{error}{f'; it wrote: {said[-500:]}' if said else ''}. Check that it can be started or reached from "
                "this machine and speaks MCP"
            ) from error

    def close(self) -> None:
        """Ends the connection, and a server that was started. Calls fail afterwards."""
        if not self._loop.is_running():
            return
        atexit.unregister(self.close)
        with contextlib.suppress(Exception):
            self._submit(self._ended()).result(timeout=20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._loop.is_running():
            self._loop.close()

    async def call(self, name: str, arguments: Arguments) -> str:
        """Raises ToolUseError for an error that the tool reports, ToolFailure for every other one."""
        if not self._loop.is_running():
            raise ToolFailure(self._named("it was closed"))
        return await asyncio.wrap_future(self._submit(self._called(name, dict(arguments))))

    def _submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # The methods below run on the thread's event loop.

    async def _called(self, name: str, arguments: dict[str, Any]) -> str:
        from mcp import MCPError
        from mcp_types import INVALID_PARAMS

        link = await self._connected()
        begun, link.calls = self._loop.time(), link.calls + 1
        try:
            async with asyncio.timeout(self._limits.call_s):
                result = await link.client.call_tool(name, arguments)
            link.answered_at = self._loop.time()
        except (TimeoutError, asyncio.CancelledError) as error:
            if link.answered_at < begun:  # it has answered no call since this one began
                link.retire()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise ToolFailure(self._named(f"no answer within {self._limits.call_s:g} s")) from error
        except Exception as error:
            if isinstance(error, MCPError) and error.code == INVALID_PARAMS:
                raise ToolUseError(plain(error.message)) from error
            link.retire()
            raise ToolFailure(self._named(f"tool {name!r}: {_reason(error)}")) from error
        finally:
            link.calls -= 1
            if link.retired:
                link.retire()
        text = head(plain(_text(result)), self._limits.answer_chars)
        if result.is_error:
            raise ToolUseError(text or "The tool reports an error.")
        return text or NO_TEXT

    async def _connected(self) -> _Link:
        """The connection, opened if there is none or the last one failed. Raises ToolFailure."""
        async with self._opening:
            if self._link is not None and not self._link.retired:
                return self._link
            if self._loop.time() < self._not_before:
                raise ToolFailure(self._named("it could not be reached a moment ago"))
            ready: asyncio.Future[_Link] = self._loop.create_future()
            holder = self._loop.create_task(self._hold(ready))
            self._holders.add(holder)
            holder.add_done_callback(self._holders.discard)
            try:
                async with asyncio.timeout(self._limits.start_s):
                    self._link = await ready
            except (Exception, asyncio.CancelledError) as error:
                holder.cancel()
                if isinstance(error, asyncio.CancelledError):
                    raise
                self._not_before = self._loop.time() + PAUSE_S
                late = isinstance(error, TimeoutError)
                why = f"no answer within {self._limits.start_s:g} s" if late else _reason(error)
                raise ToolFailure(self._named(f"it cannot be reached ({why})")) from error
            return self._link

    async def _hold(self, ready: asyncio.Future[_Link]) -> None:
        """Opens a connection, and closes it in the same task, as the package requires."""
        from mcp import Client

        from icrl_megatron.agents import mcp_transports

        size = self._limits.message_bytes
        if isinstance(self._server, str):
            transport = mcp_transports.http(self._server, size)
        else:
            self._errors.clear()
            transport = mcp_transports.stdio(self._server, self._environment, size, self._errors)
        try:
            async with Client(transport) as client:
                link = _Link(client)
                if not ready.done():
                    ready.set_result(link)
                await link.stop.wait()
        except Exception as error:
            if not ready.done():
                ready.set_exception(error)

    async def _listed(self) -> list[ToolSpec]:
        link = await self._connected()
        found: list[ToolSpec] = []
        cursor: str | None = None
        try:
            async with asyncio.timeout(self._limits.start_s):
                for _ in range(MOST_PAGES):
                    page = await link.client.list_tools(cursor=cursor)
                    found += [_spec(tool) for tool in page.tools]
                    cursor = page.next_cursor
                    if cursor is None:
                        break
        except TimeoutError as error:
            raise ToolFailure(self._named(f"it did not list its tools within {self._limits.start_s:g} s")) from error
        except _BadToolError as error:
            raise ConfigError(
                f"{self._named(str(error))}; correct the tool in the server, or take the server out of agent.mcp"
            ) from error
        except Exception as error:
            raise ToolFailure(self._named(f"it did not list its tools ({_reason(error)})")) from error
        if cursor is not None:
            raise ToolFailure(self._named(f"its list of tools has more than {MOST_PAGES} pages"))
        if not found:
            raise ToolFailure(self._named("it offers no tools"))
        return found

    async def _ended(self) -> None:
        if self._link is not None:
            self._link.retired = True
            self._link.stop.set()
        holders = list(self._holders)
        if holders:
            _, late = await asyncio.wait(holders, timeout=5)
            for holder in late:
                holder.cancel()
            await asyncio.gather(*late, return_exceptions=True)


class McpTool:
    def __init__(self, server: McpServer, name: str, spec: ToolSpec) -> None:
        """`name`: the server's own name of the tool."""
        self.spec, self.name, self._server = spec, name, server

    async def call(self, arguments: Arguments) -> str:
        return await self._server.call(self.name, arguments)


class _BadToolError(Exception):
    """A tool whose name or schema the toolbox cannot use."""


def _spec(tool: Any) -> ToolSpec:
    """Raises _BadToolError."""
    if not _NAME.fullmatch(tool.name):
        raise _BadToolError(
            f"its tool {tool.name[:100]!r} has a name with other characters than letters, digits and _.-"
        )
    spec = ToolSpec(tool.name, plain(tool.description or ""), tool.input_schema, by_server=True)
    try:
        schemas.validator(spec)
    except schemas.BadSchemaError as error:
        raise _BadToolError(f"the schema of its tool {tool.name!r} {error}") from error
    return spec


def _text(result: Any) -> str:
    """The text of a result's blocks; without any, its structured content as JSON."""
    parts = []
    for block in result.content:
        text = getattr(block, "text", None) or getattr(getattr(block, "resource", None), "text", None)
        parts.append(text if isinstance(text, str) else f"[{block.type} left out]" if block.type != "text" else "")
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _reason(error: BaseException) -> str:
    """The first cause in a group of errors, in words."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:300] if str(error) else type(error).__name__
