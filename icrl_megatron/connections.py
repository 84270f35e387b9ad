"""HTTP connections for whoever is awaited in one event loop after another: each loop gets its own, closed with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import aiohttp

KEEP_ALIVE_S = 2.0
"""An idle connection is not used again after this time. uvicorn, by which SGLang and AgentGym are served, closes one
after 5 s; a loop that is busy meanwhile does not hear of it, and the next request would be lost."""


@dataclass(frozen=True)
class Link:
    """What belongs to one event loop: connections, and the gate that limits the requests in flight."""

    loop: asyncio.AbstractEventLoop
    session: aiohttp.ClientSession
    gate: asyncio.Semaphore
    holder: asyncio.Task[None]
    """Closes the session when the loop ends: asyncio.run cancels what is left, and waits for it."""
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the rest of what this loop plays is not needed. It ends with the loop, so that the next step begins
    without it; whoever waits at the gate, or between two tries, finds it set when his turn comes."""


class Connections:
    """At most `limit` requests at a time, if callers enter the gate."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._link: Link | None = None

    def here(self) -> Link:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        if self._link is None or self._link.loop is not loop:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Content-Type": "application/json"},
            )
            self._link = Link(loop, session, asyncio.Semaphore(self._limit), loop.create_task(_hold(session)))
        return self._link


async def _hold(session: aiohttp.ClientSession) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await session.close()
