"""Connections to MCP servers that bound what a server may send: a message longer than the limit ends the connection.

The transports of the official package read a line, or a JSON response, of any length. This module is imported only when
a server is used: it needs the package `mcp`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx2
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

from icrl_megatron.utils import processes

GRACE_S = 2.0
"""Seconds that a server has to exit after its standard input was closed."""
ERROR_BYTES = 2000
"""Of the end of a server's standard error, which is kept for messages."""


@asynccontextmanager
async def stdio(
    command: Sequence[str], environment: Mapping[str, str], message_bytes: int, errors: bytearray
) -> AsyncIterator[tuple[Any, Any]]:
    """Starts a server, and ends it and its children on exit. `errors` receives the end of its standard error.

    Raises OSError if it cannot be started.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=message_bytes,
        env=get_default_environment() | dict(environment),
        start_new_session=True,  # so that its children can be ended with it
    )
    try:
        received, read = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        written, sent = anyio.create_memory_object_stream[SessionMessage](0)
        async with anyio.create_task_group() as group:
            group.start_soon(_messages, process, received)
            group.start_soon(_requests, process, sent)
            group.start_soon(_errors, process, errors)
            try:
                yield read, written
            finally:
                group.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await _end(process)


async def _messages(process: asyncio.subprocess.Process, received: Any) -> None:
    """One message a line. At the end of the stream, or after a line that is too long, `received` is closed: every call
    in flight then fails."""
    assert process.stdout is not None
    async with received:
        with contextlib.suppress(ValueError, anyio.BrokenResourceError):  # ValueError: a line over the limit
            while line := await process.stdout.readline():
                await received.send(_parsed(line))


def _parsed(line: bytes) -> SessionMessage | Exception:
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError as error:
        return error


async def _requests(process: asyncio.subprocess.Process, sent: Any) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # a server that died is noticed by `_messages`
        async for request in sent:
            line = request.message.model_dump_json(by_alias=True, exclude_unset=True)
            process.stdin.write(f"{line}\n".encode(errors="replace"))
            await process.stdin.drain()


async def _errors(process: asyncio.subprocess.Process, errors: bytearray) -> None:
    assert process.stderr is not None
    while chunk := await process.stderr.read(1 << 16):
        errors += chunk
        del errors[:-ERROR_BYTES]


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    await _exited(process)
    processes.signal_group(process.pid, signal.SIGKILL)  # its children too
    await _exited(process)
    process._transport.close()  # type: ignore[attr-defined]  # pipes with unread data; nothing public closes them


async def _exited(process: asyncio.subprocess.Process) -> None:
    """Waits up to `GRACE_S`. `process.wait()` would also wait for children that hold the pipes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GRACE_S):
            while process.returncode is None:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def http(url: str, message_bytes: int) -> AsyncIterator[tuple[Any, Any]]:
    """A streamable HTTP server."""
    timeout = httpx2.Timeout(30.0, read=None)  # calls have a deadline of their own
    headers = {"Accept-Encoding": "identity"}
    async with (
        httpx2.AsyncClient(transport=_Bounded(message_bytes), timeout=timeout, headers=headers) as client,
        streamable_http_client(url, http_client=client, max_sse_event_size=message_bytes) as streams,
    ):
        yield streams


class _Bounded(httpx2.AsyncHTTPTransport):
    """Ends a response that is longer than the limit, unless it is a stream of events: those are bounded one by one."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            await response.aclose()
            raise httpx2.DecodingError("the server compresses its answers, which was not asked for", request=request)
        if not response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            response.stream = _BoundedStream(response.stream, self._limit)
        return response


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, inner: Any, limit: int) -> None:
        self._inner, self._left, self._limit = inner, limit, limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            self._left -= len(chunk)
            if self._left < 0:
                raise httpx2.StreamError(f"the answer has more than {self._limit} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()
