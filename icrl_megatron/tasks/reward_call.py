"""Calls a user's reward functions on one reply and combines what they return. Runs in the worker process."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from icrl_megatron.utils.user_code import raised_at

SCORES = ("score", "reward")
"""Keys of a returned dict that contain the reward; its other numbers are measures."""
_TRL = "completions"


class WrongReward(ValueError):
    """A reward function returned something that is not a reward; the message says what."""


class RewardRaised(RuntimeError):
    """A reward function raised; the message has its file and line."""


@dataclass(frozen=True)
class Graded:
    """One reply and its row."""

    prompt: str
    response: str
    label: str
    given_prompt: Any
    """The prompt as it is in the row: text, or messages."""
    columns: Mapping[str, Any]
    """The other columns of the row, without the label's."""
    label_column: str


@dataclass(frozen=True)
class WeighedReward:
    """A reward function with its settings (`settings/task_options.py`)."""

    name: str
    function: Callable[..., Any]
    weight: float


@dataclass(frozen=True)
class Reward:
    value: float
    """In [0, 1]."""
    measures: dict[str, float]


def total(rewards: list[WeighedReward], graded: Graded, low: float, high: float, several: bool | None = None) -> Reward:
    """The weighted mean of the rewards, scaled from [low, high] to [0, 1]. `several`: whether each is a measure too; by
    default, if there is more than one.

    Raises RewardRaised if a function raises, and WrongReward if one returns anything but a number in [low, high] or a
    dict with one.
    """
    parts: list[float] = []
    measures: dict[str, float] = {}
    for one in rewards:
        found, counted = _read(one.name, _called(one, graded), low, high)
        parts.append(one.weight * found)
        measures |= counted
        if several if several is not None else len(rewards) > 1:
            measures[measure_of(one.name)] = found
    mean = math.fsum(parts) / math.fsum(one.weight for one in rewards)
    return Reward(min(1.0, max(0.0, (mean - low) / (high - low))), measures)


def measure_of(name: str) -> str:
    """What metrics call one of several rewards."""
    return f"reward_{name.rpartition(':')[2].lower()}"


def _called(one: WeighedReward, graded: Graded) -> Any:
    try:
        parameters = inspect.signature(one.function).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        trl = _TRL in parameters
        given = _lists(graded) if trl else _values(graded)
        chosen = {name: value for name, value in given.items() if takes_all or name in parameters}
        returned = one.function(**chosen)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_awaited(returned))
    except (Exception, SystemExit) as error:
        raise RewardRaised(f"{one.name} raised {raised_at(error)}") from error
    return _only(one.name, returned) if trl else returned


async def _awaited(returned: Any) -> Any:
    return await returned


def _values(graded: Graded) -> dict[str, Any]:
    return {**graded.columns, "prompt": graded.prompt, "response": graded.response, "label": graded.label}


def _lists(graded: Graded) -> dict[str, Any]:
    """The arguments of TRL's reward functions: lists of one element."""
    talk = isinstance(graded.given_prompt, list)
    completion: Any = [{"role": "assistant", "content": graded.response}] if talk else graded.response
    columns = {**graded.columns, graded.label_column: graded.label}
    return {
        **{name: [value] for name, value in columns.items()},
        "prompts": [graded.given_prompt],
        "completions": [completion],
    }


def _only(name: str, returned: Any) -> Any:
    if not isinstance(returned, list | tuple) or len(returned) != 1:
        raise WrongReward(f"{name} returned {_shown(returned)} for one completion; return a list with one number")
    return returned[0]


def _read(name: str, returned: Any, low: float, high: float) -> tuple[float, dict[str, float]]:
    measures: dict[str, float] = {}
    if isinstance(returned, dict):
        key = next((key for key in SCORES if key in returned), None)
        if key is None:
            raise WrongReward(f"{name} returned {_shown(returned)}; a dict needs the reward under {SCORES[0]!r}")
        for other, value in returned.items():
            if other != key and (number := _number(value)) is not None:
                if not math.isfinite(number):
                    raise WrongReward(f"{name} returned {number} for {other!r}; measures must be finite numbers")
                measures[str(other)] = number
        returned = returned[key]
    found = _number(returned)
    if found is None:
        raise WrongReward(f"{name} returned {_shown(returned)}; return a number, or a dict with 'score'")
    if not low <= found <= high:
        raise WrongReward(
            f"{name} returned the reward {found:g}, which is not in [{low:g}, {high:g}]; return one in this range, or "
            "give the range of your rewards with tasks.sources[...].reward.low and reward.high"
        )
    return found, measures


def _number(value: Any) -> float | None:
    """A Python, NumPy or torch number, also True and False; None for anything else."""
    if isinstance(value, numbers.Real):
        return float(value)
    if not isinstance(value, str | bytes) and callable(getattr(value, "item", None)):
        try:
            inner = value.item()
        except (ValueError, RuntimeError, TypeError):  # several elements
            return None
        return float(inner) if isinstance(inner, numbers.Real) else None
    return None


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except Exception:
        return f"a {type(value).__name__}"
