"""How long attempts of a system take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Timing:
    """When an attempt ran, in wall-clock time. Other attempts may have run at the same time."""

    began: float
    """Seconds since 1970."""
    seconds: float
    """Until the answer was judged, tools and all waits included."""
    agents: Mapping[str, float]
    """Agent -> seconds in which its requests waited for replies, summed. Agents may wait at the same time."""

    @staticmethod
    def of_json(fields: Any) -> Timing:
        """Raises LookupError, TypeError, ValueError or AttributeError."""
        numbers = (fields["began"], fields["seconds"], *fields["agents"].values())
        if not all(type(one) in (int, float) and math.isfinite(one) and one >= 0 for one in numbers):
            raise ValueError(f"timing is {str(fields)[:80]!r}")
        return Timing(float(fields["began"]), float(fields["seconds"]), dict(fields["agents"]))


@dataclass
class AttemptClock:
    """Measures one attempt, from now on."""

    began: float = field(default_factory=time.time)
    _started: float = field(default_factory=time.monotonic)
    _agents: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def waiting(self, agent: str) -> Iterator[None]:
        """Counts the time in the block as a request of the agent, however it ends."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._agents[agent] = self._agents.get(agent, 0.0) + time.monotonic() - begun

    def read(self) -> Timing:
        """The times until now."""
        return Timing(self.began, time.monotonic() - self._started, dict(sorted(self._agents.items())))


def busy_seconds(timings: Iterable[Timing | None]) -> float | None:
    """Seconds in which at least one of the attempts ran: pauses between calls of the command do not count.
    None if the time of an attempt is unknown, or there are no attempts."""
    known = list(timings)
    spans = sorted((one.began, one.began + one.seconds) for one in known if one is not None)
    if not known or len(spans) < len(known):
        return None
    total, end = 0.0, -math.inf
    for begin, until in spans:
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total
