"""A pool of equivalent servers: least-loaded choice, retries with back-off, and a circuit breaker.

It does not know the requests. Every error ends in EnvironmentFailure, never in a reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure
from icrl_megatron.utils import connections
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.retries import PassingError, tries

TRIES = 4
BACKOFF_S = 0.25
"""Pause before the second try; doubles each time."""
MAX_FAILURES = 5
"""Consecutive failures after which a server gets no new episodes for `PAUSE_S`."""
PAUSE_S = 30.0
RETRYABLE = frozenset({429, 502, 503, 504})
CONNECTIONS = 1024


class Refused(EnvironmentFailure):
    """The server answered with an error that a retry does not fix."""

    def __init__(self, message: str, status: int, body: Any = None) -> None:
        super().__init__(message)
        self.status, self.body = status, body


@dataclass
class EnvironmentServer:
    """One address and its recent state."""

    url: str
    episodes: int = 0
    """Episodes that use it now."""
    failures: int = 0
    """Consecutive failures."""
    paused_until: float = field(default=0.0)
    environments: set[int | str] = field(default_factory=set)
    """Ids of the environments that episodes use there now."""

    def succeeded(self) -> None:
        self.failures = 0

    def failed(self) -> None:
        self.failures += 1
        if self.failures >= MAX_FAILURES:
            # After the pause, one more failure pauses it again.
            self.failures = MAX_FAILURES - 1
            self.paused_until = time.monotonic() + PAUSE_S


class Pool:
    """The servers of one task set. Raises ConfigError if there is no address, or an invalid one."""

    def __init__(
        self, urls: Sequence[str], timeout_s: float, answer_bytes: int = RolloutSettings.max_observation_bytes
    ) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`, the longest answer that is read."""
        if not urls:
            raise ConfigError(
                "no servers: give their addresses, e.g. 'tasks.sources[...].data.servers=[http://host:36001]'"
            )
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(
                    f"data.servers: {url!r} is not an address; write http://host:port, e.g. "
                    "'tasks.sources[...].data.servers=[http://host:36001]'"
                )
        self.servers = [EnvironmentServer(url.rstrip("/")) for url in dict.fromkeys(urls)]
        self._timeout_s, self._answer_bytes = timeout_s, answer_bytes
        self._connections = connections.Connections(CONNECTIONS)
        self._closing: set[asyncio.Task[None]] = set()

    def close_soon(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Calls `close` without waiting for it. Without a running event loop it does nothing: connections have ended
        with their loop, and a server drops what nobody uses."""
        with contextlib.suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            task = loop.create_task(close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    @contextlib.contextmanager
    def opening(self) -> Iterator[EnvironmentServer]:
        """The server of a new episode, which counts there from now on unless the block raises."""
        server = self.choose()
        server.episodes += 1
        try:
            yield server
        except BaseException:
            server.episodes -= 1
            raise

    def choose(self) -> EnvironmentServer:
        """The server with the fewest episodes, of those that are not paused. Raises EnvironmentFailure if all are."""
        now = time.monotonic()
        well = [s for s in self.servers if s.paused_until <= now]
        if well:
            return min(well, key=lambda s: s.episodes)
        soonest = min(self.servers, key=lambda s: s.paused_until)
        raise EnvironmentFailure(
            f"all {len(self.servers)} servers failed {MAX_FAILURES} times in a row; the next try is in "
            f"{soonest.paused_until - now:.0f} s. Check {soonest.url}"
        )

    async def call(
        self, server: EnvironmentServer, method: str, path: str, body: Any = None, again: bool = True
    ) -> Any:
        """Returns one JSON answer. `again`: whether a call whose answer was lost may be repeated.

        Raises Refused if the server reports an error or its answer is not JSON, BadAnswer if the answer is too long,
        EnvironmentFailure if it does not answer within the deadline.
        """
        try:
            async for attempt in tries(TRIES, BACKOFF_S):
                with attempt:
                    return await self._try(server, method, path, body, again)
        except PassingError as failure:
            raise EnvironmentFailure(f"{server.url}{path} {failure}; is the server running?") from failure

    async def _try(self, server: EnvironmentServer, method: str, path: str, body: Any, again: bool) -> Any:
        """Raises PassingError if the call may be repeated, and what `call` raises."""
        try:
            status, answer = await self._once(method, server.url + path, body)
            if status in RETRYABLE:
                raise PassingError(f"answered HTTP {status}")
        except connections.ResponseTooLongError as error:
            raise BadAnswer(
                f"{server.url}{path} answered more than rollout.max_observation_bytes = {self._answer_bytes} "
                "bytes: raise that, or make the server's answers shorter"
            ) from error
        except (PassingError, aiohttp.ClientError, OSError, TimeoutError) as error:
            server.failed()
            failure = self._described(error)
            executed = not isinstance(error, PassingError | aiohttp.ClientConnectorError)
            if executed and not again:
                raise EnvironmentFailure(f"{server.url}{path} {failure}; is the server running?") from error
            raise PassingError(failure) from error
        server.succeeded()
        return _body(status, answer, server.url + path)

    def _described(self, error: Exception) -> str:
        if isinstance(error, PassingError):
            return str(error)
        if isinstance(error, aiohttp.ClientConnectorError):
            return f"cannot be reached ({error})"
        late = isinstance(error, TimeoutError)
        return f"did not answer within {self._timeout_s:g} s" if late else f"broke off ({error!r})"

    async def _once(self, method: str, url: str, body: Any) -> tuple[int, bytes]:
        link, limit = self._connections.here(), aiohttp.ClientTimeout(total=self._timeout_s)
        async with link.gate, link.session.request(method, url, json=body, timeout=limit) as reply:
            return reply.status, await connections.body(reply, self._answer_bytes)


def _body(status: int, answer: bytes, url: str) -> Any:
    text = answer.decode(errors="replace")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if status >= 400:
        raise Refused(f"{url} answered HTTP {status}: {text[:200]}", status, body)
    if body is None:
        raise Refused(f"{url} did not answer JSON: {text[:100]!r}", status)
    return body
