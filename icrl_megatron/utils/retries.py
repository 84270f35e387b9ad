"""Further tries of a request that failed for a passing reason, with growing pauses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenacity import AsyncRetrying


class PassingError(Exception):
    """A failure that another try may not meet again."""


def pauses_s(count: int, pause_s: float) -> float:
    """Seconds of all pauses of `tries`, if each try fails."""
    return pause_s * (2 ** (count - 1) - 1)


def tries(count: int, pause_s: float) -> AsyncRetrying:
    """At most `count` tries. The pause before the second one is `pause_s` seconds, and doubles with each further one.
    Only a PassingError leads to another try; the last one is raised.

        async for attempt in tries(4, 0.25):
            with attempt:
                return await ask()
    """
    # Imported here, because a launcher's environment (NeMo-Run's) imports task sets and lacks tenacity.
    from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    return AsyncRetrying(
        stop=stop_after_attempt(count),
        wait=wait_exponential(multiplier=pause_s),
        retry=retry_if_exception_type(PassingError),
        reraise=True,
    )
