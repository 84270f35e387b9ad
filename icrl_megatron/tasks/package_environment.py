"""What the environments of other packages share (verifiers, OpenEnv): their rewards, and tool calls written as text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from icrl_megatron.agents.formats import FinalAnswer, Malformed, Parsed, Qwen3
from icrl_megatron.settings.task_sections import RewardRange
from icrl_megatron.tasks.base import BadAnswer, shown
from icrl_megatron.utils.errors import ConfigError

MOST_MEASURES = 50
_SAME = 1e-9
"""A weighted sum of rewards may miss 1 by rounding."""
_CALLS = Qwen3(())


class Rewarded:
    """The reward of an attempt and the numbers that its environment logged, as `Environment` shows them."""

    def __init__(self, scale: RewardRange, max_turns: int) -> None:
        self.max_turns, self._scale = max_turns, scale
        self.forget()

    def forget(self) -> None:
        """Call when an attempt begins."""
        self._reward: float | None = None
        self._measures: dict[str, float] = {}
        self._turns = 0

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


def check_range(name: str, scale: RewardRange, whose: str = "its") -> None:
    """Raises ConfigError if the range of rewards is empty."""
    if scale.low >= scale.high:
        raise ConfigError(
            f"task set {name!r}: reward.low={scale.low:g} is not below reward.high={scale.high:g}; give the range of "
            f"{whose} rewards, e.g. reward.low=-1 reward.high=1"
        )


def offered(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the prompt says about tools and the form of calls; nothing without tools."""
    if not tools:
        return ""
    form = '<tool_call>{"name": "...", "arguments": {...}}</tool_call>'
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return f"\n\nTools:\n{listed}\n\nTo call one, write {form}. A reply without a call is your answer."


def calls_of(reply: str) -> tuple[Parsed, str]:
    """(the tool calls of a reply, the text before them)."""
    found = _CALLS.parse(reply)
    if isinstance(found, FinalAnswer | Malformed | None):
        return found, reply
    return found, reply.partition("<tool_call>")[0].strip()


def _plain(name: str) -> str:
    """A name that `measures` may have."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:60]
