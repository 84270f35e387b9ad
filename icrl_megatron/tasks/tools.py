"""The tools of one entry of `tasks.sources`, by its settings: `agent.tools` and what each tool needs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from functools import cached_property
from pathlib import Path

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.agents.calculator import Calculator
from icrl_megatron.agents.formats import ToolFormat, make_format
from icrl_megatron.agents.mcp import McpLimits, McpServer
from icrl_megatron.agents.page import FetchedPages, FetchLimits, Page, StoredPages
from icrl_megatron.agents.python import Python, PythonLimits
from icrl_megatron.agents.search import Search
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.agents.tools import Tool
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import ToolsSource, check_unused
from icrl_megatron.settings.tool_schema import McpTools
from icrl_megatron.tasks.retrieval import LocalRetriever, RemoteRetriever
from icrl_megatron.tasks.servers import TRIES
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.sandbox import SandboxLimits

PASSAGE_CHARS = 2000
SPARE_S = 10.0
"""Between a tool's own time limit and the toolbox's, which only ends what the former misses."""
BUSY_FACTOR = 2.5
"""A program on a busy machine may take this many times its wall-clock limit."""
OPTIONS = {
    "search": ("data.corpus", "data.servers", "data.passages", "data.request_timeout_s", "serve"),
    "page": ("agent.page",),
    "python": ("agent.python_state",),
    "mcp": ("agent.mcp",),
}
"""Tool -> its options."""
_PREFIX = re.compile(r"[A-Za-z0-9_.-]*")


class SourceTools:
    """Opened when they are first needed, because opening starts MCP servers, which end with this process."""

    def __init__(
        self, source: ToolsSource, names: list[str], answer_bytes: int = RolloutSettings.max_observation_bytes
    ) -> None:
        """`names`: `agent.tools`, or what an empty list stands for. `answer_bytes`: `rollout.max_observation_bytes`.

        Raises ConfigError naming a setting that cannot work, as far as that is known without opening a tool.
        """
        self._where = f"task set {source.name!r}"
        check_tools(source, names)
        self._source, self.names, self._answer_bytes = source, names, answer_bytes
        self.cache: ToolCache | None = None
        """Set before the first use of `toolbox` or `form`."""

    @cached_property
    def toolbox(self) -> Toolbox:
        """Raises ConfigError as `check` does."""
        with ExitStack() as held:
            toolbox = Toolbox(self._opened(held), self._limits(), self.cache)
            held.pop_all()  # in use until the process ends
        return toolbox

    @cached_property
    def form(self) -> ToolFormat:
        return self._form(self.toolbox)

    def check(self) -> None:
        """Opens the tools and closes them again. Raises ConfigError for a tool that does not work on this machine, for
        an MCP server that cannot be started, and for tools that `agent.format` cannot write."""
        with ExitStack() as held:
            self._form(Toolbox(self._opened(held), self._limits()))

    def _form(self, toolbox: Toolbox) -> ToolFormat:
        try:
            return make_format(self._source.agent.format, [tool.spec for tool in toolbox.tools.values()])
        except ConfigError as error:
            raise ConfigError(f"{self._where}: {error}") from error

    def _opened(self, held: ExitStack) -> list[Tool]:
        """The tools. `held` closes their servers. Raises ConfigError naming the tool that does not work."""
        found: list[Tool] = []
        for name in self.names:
            try:
                found += self._named(name, held)
            except ConfigError as error:
                raise ConfigError(f"{self._where}, {name} of agent.tools: {error}") from error
        return found

    def _named(self, name: str, held: ExitStack) -> Iterator[Tool]:
        data, agent = self._source.data, self._source.agent
        match name:
            case "search":
                if data.corpus or data.servers:
                    _ = self._retriever  # builds the index
                yield Search(self._find, data.passages, PASSAGE_CHARS, self._version())
            case "page" if agent.page.path:
                yield Page(StoredPages(Path(agent.page.path)), agent.page.chars)
            case "page":
                yield Page(FetchedPages(FetchLimits(agent.page.timeout_s)), agent.page.chars, "web")
            case "python":
                limits = PythonLimits(data.grading_timeout_s, data.program_memory_mib << 20)
                yield Python(limits, agent.python_state, data.grading_workers)
            case "calculator":
                yield Calculator()
            case _:
                for i, server in enumerate(agent.mcp):
                    yield from _of_server(server, f"agent.mcp.{i}", held)

    async def _find(self, query: str, count: int) -> list[str]:
        return await self._retriever.search(query, count)

    @cached_property
    def _retriever(self) -> LocalRetriever | RemoteRetriever:
        data = self._source.data
        if data.corpus:
            return LocalRetriever(Path(data.corpus))
        return RemoteRetriever(data.servers, data.request_timeout_s, self._answer_bytes)

    def _version(self) -> str:
        """Names the collection. Servers that the run starts have other addresses each time, but the same command."""
        if not self._source.data.corpus:
            return self._source.serve.command or " ".join(self._source.data.servers)
        stat = Path(self._source.data.corpus).stat()
        return f"{Path(self._source.data.corpus).name} of {stat.st_size} bytes, changed {stat.st_mtime_ns}"

    def _limits(self) -> ToolLimits:
        """Of all tools together: the time of the slowest one. Search has its own retries."""
        data, agent = self._source.data, self._source.agent
        needed = {
            "search": TRIES * data.request_timeout_s + SPARE_S,
            "page": agent.page.timeout_s + SPARE_S,
            "python": BUSY_FACTOR * SandboxLimits(data.grading_timeout_s, data.program_memory_mib << 20).clock_s,
            "mcp": max((one.start_s + one.timeout_s for one in agent.mcp), default=0.0) + SPARE_S,
        }
        call_s = max((needed[name] for name in self.names if name in needed), default=SPARE_S)
        workers = {"python": data.grading_workers} if "python" in self.names else {}
        return ToolLimits(call_s=call_s, tries_of={"search": 1}, concurrency_of=workers)


class OffersTools:
    """Makes a task set `Cacheable`."""

    tools: SourceTools

    @property
    def tool_cache(self) -> ToolCache | None:
        return self.tools.cache

    @tool_cache.setter
    def tool_cache(self, cache: ToolCache | None) -> None:
        self.tools.cache = cache


def check_tools(source: ToolsSource, names: list[str]) -> None:
    """Raises ConfigError for a tool whose settings are missing, wrong or given without it. `names`: as for
    `SourceTools`."""
    agent, data, where = source.agent, source.data, f"task set {source.name!r}"
    if len(set(names)) < len(names):
        raise ConfigError(f"{where}: agent.tools={names} names a tool twice; name it once")
    if not names:
        check_unused(source, [f"agent.{one.name}" for one in fields(agent)], "without agent.tools")
    for tool, settings in OPTIONS.items():
        if tool not in names:
            check_unused(source, settings, f"without {tool} in agent.tools")
    if "search" in names and bool(data.corpus) == (bool(data.servers) or source.served):
        raise ConfigError(
            f"{where} needs one place to search: set exactly one of data.corpus, data.servers and serve.command, e.g. "
            "tasks.sources[...].data.corpus=FILE.jsonl, or take search out of agent.tools"
        )
    if data.corpus:
        check_unused(source, ["data.request_timeout_s"], "with data.corpus")
    if "mcp" in names and not agent.mcp:
        raise ConfigError(
            f"{where}: agent.tools has mcp, but agent.mcp names no server: add one, e.g. "
            "'tasks.sources[...].agent.mcp=[{command: [mcp-server-time]}]' or "
            "'tasks.sources[...].agent.mcp=[{url: http://host:8000/mcp}]', or take mcp out of agent.tools"
        )
    for i, server in enumerate(agent.mcp):
        _check_server(server, f"{where}: agent.mcp.{i}")


def _check_server(server: McpTools, where: str) -> None:
    if bool(server.command) == bool(server.url):
        raise ConfigError(f"{where} needs one server: set either command, e.g. [mcp-server-time], or url")
    if server.url and not server.url.startswith(("http://", "https://")):
        raise ConfigError(f"{where}.url={server.url}: must be an address such as http://host:8000/mcp")
    if not _PREFIX.fullmatch(server.prefix):
        raise ConfigError(f"{where}.prefix={server.prefix!r}: may have letters, digits and _.- only")
    missing = [name for name in server.environment if name not in os.environ]
    if missing:
        raise ConfigError(f"{where}.environment: {missing[0]} is not set here; export it, or take it out of the list")


def _of_server(server: McpTools, where: str, held: ExitStack) -> Iterator[Tool]:
    """The chosen tools of a server, which is started."""
    limits = McpLimits(start_s=server.start_s, call_s=server.timeout_s)
    inherited = {name: os.environ[name] for name in server.environment}
    try:
        opened = McpServer(server.command or server.url, limits, server.prefix, inherited, server.version)
        held.callback(opened.close)
        found = opened.tools()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    names = [tool.name for tool in found]
    unknown = [name for name in server.tools if name not in names]
    if unknown:
        raise ConfigError(f"{where}.tools has {unknown[0]}: the server's tools are {', '.join(names)}")
    yield from (tool for tool in found if not server.tools or tool.name in server.tools)
