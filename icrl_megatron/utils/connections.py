"""HTTP connections for code that runs several event loops in sequence: each loop has its own session, closed with it.

Servers may be broken or hostile, so `body` reads responses: it never returns more bytes than the caller allows,
compressed or not.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

KEEP_ALIVE_S = 2.0
"""An idle connection is not reused after this time. SGLang and AgentGym run on uvicorn, which closes idle connections
after 5 s; a busy event loop does not notice that, and the next request would fail."""
_CHUNK = 1 << 16
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""Content-Encoding -> zlib's `wbits`."""


class ResponseTooLongError(ValueError):
    """A response is longer than the caller allows; the rest of it was not read."""


@dataclass(frozen=True)
class Link:
    """The state of one event loop: its connections, and the gate that limits the requests in flight."""

    loop: asyncio.AbstractEventLoop
    session: aiohttp.ClientSession
    gate: asyncio.Semaphore
    holder: asyncio.Task[None]
    """Closes the session when the loop ends: asyncio.run cancels the remaining tasks and waits for them."""
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the remaining episodes of this loop are not needed. It belongs to the loop, so the next step starts with
    it unset; a request that waits at the gate or between two tries sees it when it continues."""


class Connections:
    """At most `limit` requests at a time, if callers enter the gate. Responses must be read with `body`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._link: Link | None = None

    def here(self) -> Link:
        """The link of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._link is None or self._link.loop is not loop:
            session = open_session(aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S))
            self._link = Link(loop, session, asyncio.Semaphore(self._limit), loop.create_task(_hold(session)))
        return self._link


def open_session(connector: aiohttp.TCPConnector | None = None) -> aiohttp.ClientSession:
    """A session without automatic decompression: aiohttp would decompress a chunk to any size before `body` sees it."""
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Content-Type": "application/json", "Accept-Encoding": "gzip, deflate"},
        auto_decompress=False,
    )


async def body(reply: aiohttp.ClientResponse, limit: int) -> bytes:
    """The whole body, decompressed.

    Raises ResponseTooLongError if it has more than `limit` bytes: the connection is closed after at most `limit`
    bytes plus one chunk were read. Raises aiohttp.ClientPayloadError if the compressed data is damaged or of an
    unknown type.
    """
    encoding = reply.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", *_WINDOWS):
        reply.close()
        raise aiohttp.ClientPayloadError(
            f"the answer has the Content-Encoding {encoding[:40]!r}, which is not supported"
        )
    inflate = _Inflate(_WINDOWS[encoding]) if encoding in _WINDOWS else None
    decoded: Callable[[bytes, int], bytes] = inflate.more if inflate else _as_it_is
    found = bytearray()
    async for chunk in reply.content.iter_chunked(_CHUNK):
        found += decoded(chunk, limit + 1 - len(found))
        if len(found) > limit:
            reply.close()
            raise ResponseTooLongError(f"the answer has more than {limit} bytes")
    if inflate is not None and found and not inflate.ended:
        raise aiohttp.ClientPayloadError(f"the answer's {encoding} data ends early")
    return bytes(found)


def _as_it_is(chunk: bytes, room: int) -> bytes:
    return chunk


class _Inflate:
    """Decompresses at most `room` bytes at a time."""

    def __init__(self, wbits: int) -> None:
        self._stream, self._wbits, self._begun = zlib.decompressobj(wbits), wbits, False

    @property
    def ended(self) -> bool:
        return self._stream.eof

    def more(self, chunk: bytes, room: int) -> bytes:
        try:
            found = self._stream.decompress(chunk, room)
        except zlib.error as error:
            if self._begun or self._wbits != zlib.MAX_WBITS:
                raise aiohttp.ClientPayloadError(f"the answer's compressed data is damaged ({error})") from error
            # Some servers send "deflate" without the required zlib header.
            self._stream, self._begun = zlib.decompressobj(-zlib.MAX_WBITS), True
            return self.more(chunk, room)
        self._begun = True
        return found


async def _hold(session: aiohttp.ClientSession) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await session.close()
