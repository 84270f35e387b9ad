"""Whatever a task's code returns or raises, the result is an episode or a dropped one with a reason, never an error."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_environments import (
    METHODS,
    PROMPTER,
    SETTINGS,
    TASK,
    WAITS,
    Hostile,
    Says,
    Works,
    check,
    play_one,
    raising,
    returning,
)

from icrl_megatron.rollout.episode import EpisodeSetup, play_episode
from icrl_megatron.rollout.speakers import Seeds, Speakers
from icrl_megatron.tasks.base import EnvironmentFailure, StepResult
from icrl_megatron.types import DroppedEpisode, Episode, Task
from icrl_megatron.utils.errors import ConfigError


class Text(str):
    """A str with broken methods."""

    def __len__(self) -> int:
        return 10**9

    def encode(self, *arguments: object, **options: object) -> bytes:
        raise RuntimeError("no bytes")

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Number(float):
    def __le__(self, other: object) -> bool:
        raise RuntimeError("cannot be compared")

    __ge__ = __le__


def a_generator() -> Any:
    yield "a text"


def too_deep() -> list[Any]:
    found: list[Any] = []
    for _ in range(5_000):
        found = [found]
    return found


def same(value: object) -> object:
    return value


ODD: tuple[Callable[[], Any], ...] = tuple(
    functools.partial(same, value)
    for value in (
        *(None, ..., NotImplemented, True, False, 0, 1, -1, 10**400, 0.5, math.nan, math.inf, -0.1, 1.5, 1j, b"bytes"),
        *("", "up", "\ud800", "\x1b[2J", "a\x00b", "\u2028", Decimal("0.5"), Fraction(1, 2), np.float32(0.5)),
        *(np.float64(math.nan), np.bool_(True), np.array(0.5), np.array([1, 2]), np.int64(3), np.str_("up")),
        *(Text("up"), Number(0.5), Hostile, object(), [], {}, (), ("up", True), {"observation": "up", "done": True}),
        *(StepResult("up", True), StepResult(None, True), StepResult("up", None), StepResult("up", "false")),
        *(StepResult(b"up", True), StepResult(Text("up"), np.bool_(False)), SystemExit(1), asyncio.sleep, type, int),
        EnvironmentFailure("returned"),
    )
)  # type: ignore[arg-type]
ODDER: tuple[Callable[[], Any], ...] = (*ODD, Hostile, a_generator, too_deep, lambda: StepResult("up", Hostile()))  # type: ignore[arg-type]
PLAIN = st.text() | st.floats() | st.integers() | st.binary() | st.lists(st.text())
ANY = st.integers(0, len(ODDER) - 1).map(lambda i: ODDER[i]) | PLAIN.map(lambda value: lambda: value)
"""Functions that make a value, because pytest and hypothesis cannot print every value."""


@given(st.sampled_from(METHODS), ANY, st.booleans())
def test_any_value_may_be_returned_by_any_method(method: str, value: Callable[[], Any], wrapped: bool) -> None:
    check(play_one(returning(method, value(), wrapped)))


@pytest.mark.parametrize("method", METHODS)
def test_every_odd_value_may_be_returned_by_every_method(method: str) -> None:
    for make in ODDER:
        check(play_one(returning(method, make())))


@given(ANY)
def test_any_value_may_be_max_turns_or_the_environment(value: Callable[[], Any]) -> None:
    check(play_one(type("Odd", (Works,), {"max_turns": value()})))
    check(play_one(lambda task: value()))


@pytest.mark.parametrize(
    ("method", "value", "said"),
    [
        ("reset", None, "it must be a str"),
        ("reset", b"go", "it must be a str"),
        ("parse", 3, "it must be a str"),
        ("hint", None, "it must be a str"),
        ("step", None, "it must be a StepResult(observation, done)"),
        ("step", ("down", True), "it must be a StepResult(observation, done)"),
        ("step", StepResult(None, True), "its observation must be a str"),  # type: ignore[arg-type]
        ("step", StepResult("down", "false"), "its done must be True or False"),  # type: ignore[arg-type]
        ("outcome", None, "it must be a finite number in [0, 1]; divide scores by their maximum"),
        ("outcome", "1", "it must be a finite number in [0, 1]"),
        ("outcome", math.nan, "it must be a finite number in [0, 1]"),
        ("outcome", math.inf, "it must be a finite number in [0, 1]"),
        ("outcome", -0.1, "it must be a finite number in [0, 1]"),
        ("outcome", 1.5, "it must be a finite number in [0, 1]"),
        ("success", 1, "it must be True or False"),
        ("summary", ["down"], "it must be a str"),
        ("measures", None, "it must be a dict of at most 50 names"),
        ("measures", {"Calls": 1}, "it must be a dict of at most 50 names"),
        ("measures", {"calls": "1"}, "its values must be finite numbers"),
        ("measures", {"calls": math.nan}, "its values must be finite numbers"),
    ],
)
def test_a_wrong_return_value_drops_the_episode_with_a_reason(method: str, value: object, said: str) -> None:
    ended = play_one(returning(method, value))
    assert isinstance(ended, DroppedEpisode) and ended.bad_answer
    assert ended.error.startswith(f"{method} of task 'set/train/0' (task set 'set') is ")
    assert said in ended.error


def test_measures_of_an_environment_are_recorded() -> None:
    ended = play_one(returning("measures", {"calls": np.int64(3), "answered": True}))
    assert isinstance(ended, Episode) and ended.attempts[0].measures == (("answered", 1.0), ("calls", 3.0))
    plain = play_one(Works)
    assert isinstance(plain, Episode) and plain.attempts[0].measures == ()


def dropped(factory: Callable[[Task], Any]) -> str:
    """The reason why an episode of this environment is dropped."""
    ended = play_one(factory)
    assert isinstance(ended, DroppedEpisode)
    return ended.error


@pytest.mark.parametrize("method", WAITS)
def test_a_method_that_is_not_a_coroutine_is_reported(method: str) -> None:
    value = "go" if method == "reset" else StepResult("down", True)
    assert "it must be awaitable; write it as `async def`" in dropped(returning(method, value, wrapped=False))


@pytest.mark.parametrize("turns", [None, 0, -3, True, 2.0, "3", math.nan])
def test_max_turns_that_is_not_a_positive_integer_is_reported(turns: object) -> None:
    error = dropped(type("Odd", (Works,), {"max_turns": turns}))
    assert error.startswith("max_turns of task 'set/train/0'") and "whole number of at least 1" in error


@pytest.mark.parametrize("factory", [lambda task: None, lambda task: Works, lambda task: object()])
def test_an_object_that_is_not_an_environment_is_reported(factory: Callable[[Task], Any]) -> None:
    assert dropped(factory).startswith("construction")


@pytest.mark.parametrize("outcome", [1, True, np.float32(1), np.float64(1), np.int64(1), Fraction(1)])
@pytest.mark.parametrize("flag", [True, np.bool_(True)])
def test_numbers_and_booleans_of_numpy_are_accepted(outcome: object, flag: object) -> None:
    class Library(Works):
        async def step(self, action: str) -> StepResult:
            return StepResult(np.str_("down"), flag)  # type: ignore[arg-type]

        def outcome(self) -> Any:
            return outcome

        def success(self) -> Any:
            return flag

        max_turns = np.int64(3)

    ended = play_one(Library)
    assert isinstance(ended, Episode)
    assert (ended.attempts[0].outcome, ended.attempts[0].success) == (1.0, True)
    check(ended)


class WithoutText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Odd(EnvironmentFailure):
    def __str__(self) -> str:
        return "x" * 10**6 + "\x1b[2J"


ERRORS = [
    ValueError("v"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError("c"), StopIteration(7),
    StopAsyncIteration(), RecursionError("r"), MemoryError(), TimeoutError("t"), ExceptionGroup("g", [ValueError("v")]),
    BaseExceptionGroup("g", [KeyboardInterrupt()]), WithoutText(), Odd(), OSError(5, "\x1b]0;title\x07\nline"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "r"), type("Mine", (BaseException,), {})("m"),
]  # fmt: skip


@pytest.mark.parametrize("method", [*METHODS, "__init__"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_any_exception_of_any_method_drops_the_episode(method: str, error: BaseException) -> None:
    ended = play_one(raising(method, error))
    assert isinstance(ended, DroppedEpisode) and not ended.bad_answer and not ended.late
    if not isinstance(error, EnvironmentFailure):
        what = "construction" if method == "__init__" else method
        assert ended.error.startswith(f"{what} raised ")
    check(ended)


def test_endless_recursion_drops_the_episode() -> None:
    def deeper(self: Works, *arguments: object) -> Any:
        return deeper(self)

    for method in ("parse", "success"):
        assert "RecursionError" in dropped(type("Deep", (Works,), {method: deeper}))


def test_a_config_error_is_raised() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpus"):
        play_one(raising("step", ConfigError("data.corpus: no such file")))


def test_a_system_exit_in_an_asyncio_task_drops_the_episode() -> None:
    class Starts(Works):
        async def step(self, action: str) -> StepResult:
            async def leaves() -> None:
                raise SystemExit(3)

            await asyncio.gather(leaves())
            return StepResult("down", True)

    assert "raised SystemExit" in dropped(Starts)


async def test_a_cancelled_episode_ends_even_if_its_environment_catches_the_cancellation() -> None:
    class Stubborn(Works):
        async def step(self, action: str) -> StepResult:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                return StepResult("down", True)
            raise AssertionError

    setup = EpisodeSetup(Stubborn, PROMPTER, SETTINGS)
    job = asyncio.create_task(play_episode(TASK, 0, setup, lambda t, i: Speakers(Says(), Says()), Seeds(0, 0)))
    await asyncio.sleep(0.05)
    job.cancel()
    await asyncio.wait({job}, timeout=5)
    assert job.cancelled()
