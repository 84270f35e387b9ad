"""A time limit for many operations at once, with one timer: all have the same limit, so the oldest one ends first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")


class Deadlines:
    """Of one event loop. A timer of its own for each operation costs as much as the rest of a tool call."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._open: dict[asyncio.Timeout, float] = {}
        """Operation -> its deadline in the loop's time; the oldest first."""
        self._armed = False

    async def run(self, work: Awaitable[_T]) -> _T:
        """The result of `work`. Raises TimeoutError after the limit, and what `work` raises."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as limit:
            self._open[limit] = loop.time() + self._seconds
            if not self._armed:
                self._armed = True
                loop.call_later(self._seconds, self._sweep, loop)
            try:
                return await work
            finally:
                self._open.pop(limit, None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends what is late, and sets the timer for the next one."""
        while self._open:
            limit, until = next(iter(self._open.items()))
            if until > loop.time():
                loop.call_at(until, self._sweep, loop)
                return
            del self._open[limit]
            limit.reschedule(loop.time())
        self._armed = False
