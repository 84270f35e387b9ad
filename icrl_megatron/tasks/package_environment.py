"""What the environments of other packages share (verifiers, OpenEnv): their replies, rewards and check."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from icrl_megatron.settings.task_sections import RewardRange
from icrl_megatron.tasks.base import BadAnswer, Environment, EnvironmentFailure, shown
from icrl_megatron.utils.errors import ConfigError

MOST_MEASURES = 50
_SAME = 1e-9
"""A weighted sum of rewards may miss 1 by rounding."""


class PackageEnvironment:
    """What `Environment` has besides `reset` and `step`: how replies are read, the reward of an attempt, and the
    numbers that its environment logged."""

    def __init__(self, scale: RewardRange, max_turns: int) -> None:
        self.max_turns, self._scale = max_turns, scale
        self.forget()

    def forget(self) -> None:
        """Call when an attempt begins."""
        self._reward: float | None = None
        self._measures: dict[str, float] = {}
        self._turns, self._problem = 0, ""

    def problem_of(self, reply: str) -> str:
        """What is wrong with a reply, in words for the model; empty if nothing is."""
        raise NotImplementedError

    def parse(self, reply: str) -> str | None:
        self._turns += 1
        self._problem = self.problem_of(reply)
        return None if self._problem else reply.strip()

    def hint(self) -> str:
        return self._problem

    def reward(self, value: Any, numbers: Mapping[str, Any]) -> None:
        """Sets the attempt's reward. Raises BadAnswer if it is not a number in the range of the settings."""
        low, high = self._scale.low, self._scale.high
        if isinstance(value, bool | int | float) and low - _SAME <= value <= high + _SAME:  # NaN is in no range
            self._reward = min(1.0, max(0.0, (value - low) / (high - low)))
            fine = {name: n for name, n in numbers.items() if isinstance(n, bool | int | float) and math.isfinite(n)}
            self._measures = {_plain(name): float(n) for name, n in list(fine.items())[:MOST_MEASURES]}
            return
        raise BadAnswer(
            f"the environment gave the reward {shown(value)}, which is not a number in [{low:g}, {high:g}]: give the "
            "range of its rewards with tasks.sources[...].reward.low and reward.high"
        )

    def outcome(self) -> float:
        return 0.0 if self._reward is None else self._reward

    def success(self) -> bool:
        return self._reward is not None and self._reward >= self._scale.success - _SAME

    def summary(self) -> str:
        if self._reward is None:
            return f"The environment gave no reward in {self._turns} turns."
        numbers = "".join(f", {name} {value:.4g}" for name, value in self._measures.items())
        return f"The reward is {self._reward:.4g} after {self._turns} turns, and the best is 1{numbers}."

    def measures(self) -> dict[str, float]:
        return self._measures


def check_resets(
    where: str, environment: Environment, times: int = 1, close: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Resets an environment, and then calls `close`. Raises ConfigError, whose message begins with `where`, if the
    environment fails."""

    async def resets() -> None:
        try:
            for _ in range(times):
                await environment.reset()
        finally:
            if close is not None:
                await close()

    try:
        asyncio.run(resets())
    except EnvironmentFailure as error:
        raise ConfigError(f"{where}: {error}") from error


def check_range(name: str, scale: RewardRange, whose: str = "its") -> None:
    """Raises ConfigError if the range of rewards is empty."""
    if scale.low >= scale.high:
        raise ConfigError(
            f"task set {name!r}: reward.low={scale.low:g} is not below reward.high={scale.high:g}; give the range of "
            f"{whose} rewards, e.g. reward.low=-1 reward.high=1"
        )


def _plain(name: str) -> str:
    """A name that `measures` may have."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:60]
