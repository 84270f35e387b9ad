"""Whatever the code of a task returns or raises: an episode, or a dropped one that says why. Never an exception."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.config import ConfigError, HopelessError, RolloutSettings
from icrl_megatron.rollout.episode import Stage, play, play_episode
from icrl_megatron.rollout.guard import GuardedEnvironment
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.source import Played, require_sound
from icrl_megatron.rollout.speakers import Ask, Cast, Seeds
from icrl_megatron.rollout.teacher import teacher_casting
from icrl_megatron.sft import demonstrations
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure, StepResult
from icrl_megatron.telemetry.dumps import read_episodes, write_dump
from icrl_megatron.telemetry.metrics import rollout_metrics
from icrl_megatron.tiny import build_tokenizer
from icrl_megatron.types import Completion, DroppedEpisode, Episode, Split, Task

SETTINGS = RolloutSettings(
    rounds=2, max_turn_tokens=4, max_critique_tokens=4, context_tokens=300, templates="compact", max_turns=4
)
PROMPTER = Prompter(build_tokenizer(["go", "up", "down", *template_words("compact")]), SETTINGS)
TASK = Task("set/train/0", "set", "train", "a problem")
METHODS = ("reset", "parse", "hint", "step", "outcome", "success", "summary")
WAITS = ("reset", "step")


class Works:
    """An environment that keeps its promises, and whose attempts fail, so that everything is asked of it."""

    max_turns: Any = 3

    def __init__(self, task: Task) -> None:
        self.turns = 0

    async def reset(self) -> str:
        self.turns = 0
        return "go"

    def parse(self, reply: str) -> str | None:
        self.turns += 1
        return None if self.turns == 1 else reply

    def hint(self) -> str:
        return "go"

    async def step(self, action: str) -> StepResult:
        return StepResult("down", self.turns > 2)

    def outcome(self) -> float:
        return 0.5

    def success(self) -> bool:
        return False

    def summary(self) -> str:
        return "down"


class Says:
    """A speaker without a model."""

    async def reply(self, ask: Ask) -> Completion:
        ids = PROMPTER.encode_reply("up")
        return Completion(ids, (0.0,) * len(ids), "stop", 0)


def play_one(factory: Callable[[Task], Any], **changes: Any) -> Episode | DroppedEpisode:
    stage = Stage(factory, PROMPTER, replace(SETTINGS, **changes))
    return asyncio.run(play_episode(TASK, 0, stage, lambda task, index: Cast(Says(), Says()), Seeds(0, 0)))


def returning(method: str, value: object, wrapped: bool = True) -> type[Works]:
    """An environment whose `method` returns a value; a coroutine does where one is promised, if `wrapped`."""

    async def wait(self: Works, *arguments: object) -> Any:
        return value

    def sync(self: Works, *arguments: object) -> Any:
        return value

    return type("Returns", (Works,), {method: wait if method in WAITS and wrapped else sync})


def raising(method: str, error: BaseException | type[BaseException]) -> type[Works]:
    async def wait(self: Works, *arguments: object) -> Any:
        raise error

    def sync(self: Works, *arguments: object) -> Any:
        raise error

    return type("Raises", (Works,), {method: wait if method in WAITS else sync})


class Hostile:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("no attributes")

    def _raise(self, *arguments: object) -> Any:
        raise RuntimeError("nothing works")

    __repr__ = __str__ = __bool__ = __float__ = __index__ = __len__ = __iter__ = __eq__ = __await__ = _raise
    __hash__ = None  # type: ignore[assignment]


class Text(str):
    """A str whose methods lie."""

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
"""What makes a value: neither pytest nor hypothesis can look at all of them."""


@given(st.sampled_from(METHODS), ANY, st.booleans())
def test_any_value_of_any_method(method: str, value: Callable[[], Any], wrapped: bool) -> None:
    check(play_one(returning(method, value(), wrapped)))


@pytest.mark.parametrize("method", METHODS)
def test_every_odd_value_of_every_method(method: str) -> None:
    for make in ODDER:
        check(play_one(returning(method, make())))


@given(ANY)
def test_any_max_turns_and_any_environment(value: Callable[[], Any]) -> None:
    check(play_one(type("Odd", (Works,), {"max_turns": value()})))
    check(play_one(lambda task: value()))


def check(ended: Episode | DroppedEpisode) -> None:
    """What was played can be trained on and written down; what was dropped says why on one short line."""
    if isinstance(ended, DroppedEpisode):
        assert 0 < len(ended.error) < 1000 and ended.error.isprintable()
        return
    for attempt in ended.attempts:
        assert type(attempt.outcome) is float and 0 <= attempt.outcome <= 1
        assert type(attempt.success) is bool and type(attempt.summary) is str
        for turn in attempt.turns:
            assert type(turn.observation) is str and type(turn.action) in (str, type(None))
            (turn.observation + (turn.action or "") + attempt.summary).encode()


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
    ],
)
def test_a_wrong_return_costs_its_episode_and_says_what_is_wrong(method: str, value: object, said: str) -> None:
    ended = play_one(returning(method, value))
    assert isinstance(ended, DroppedEpisode) and ended.bad_answer
    assert ended.error.startswith(f"{method} of task 'set/train/0' (task set 'set') is ")
    assert said in ended.error


@pytest.mark.parametrize("method", WAITS)
def test_a_method_that_is_no_coroutine_is_named(method: str) -> None:
    value = "go" if method == "reset" else StepResult("down", True)
    ended = play_one(returning(method, value, wrapped=False))
    assert isinstance(ended, DroppedEpisode) and "it must be awaitable; write it as `async def`" in ended.error


@pytest.mark.parametrize("turns", [None, 0, -3, True, 2.0, "3", math.nan])
def test_max_turns_is_a_whole_number(turns: object) -> None:
    ended = play_one(type("Odd", (Works,), {"max_turns": turns}))
    assert isinstance(ended, DroppedEpisode)
    assert ended.error.startswith("max_turns of task 'set/train/0'") and "whole number of at least 1" in ended.error


@pytest.mark.parametrize("factory", [lambda task: None, lambda task: Works, lambda task: object()])
def test_what_is_no_environment_is_named(factory: Callable[[Task], Any]) -> None:
    ended = play_one(factory)
    assert isinstance(ended, DroppedEpisode) and ended.error.startswith("construction")


@pytest.mark.parametrize("outcome", [1, True, np.float32(1), np.float64(1), np.int64(1), Fraction(1)])
@pytest.mark.parametrize("flag", [True, np.bool_(True)])
def test_numbers_and_flags_of_libraries_are_taken(outcome: object, flag: object) -> None:
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


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Odd(EnvironmentFailure):
    def __str__(self) -> str:
        return "x" * 10**6 + "\x1b[2J"


ERRORS = [
    ValueError("v"), SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError("c"), StopIteration(7),
    StopAsyncIteration(), RecursionError("r"), MemoryError(), TimeoutError("t"), ExceptionGroup("g", [ValueError("v")]),
    BaseExceptionGroup("g", [KeyboardInterrupt()]), Unspeakable(), Odd(), OSError(5, "\x1b]0;title\x07\nline"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "r"), type("Mine", (BaseException,), {})("m"),
]  # fmt: skip


@pytest.mark.parametrize("method", [*METHODS, "__init__"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_any_exception_of_any_method_costs_its_episode(method: str, error: BaseException) -> None:
    ended = play_one(raising(method, error))
    assert isinstance(ended, DroppedEpisode) and not ended.bad_answer and not ended.late
    if not isinstance(error, EnvironmentFailure):
        what = "construction" if method == "__init__" else method
        assert ended.error.startswith(f"{what} raised ")
    check(ended)


def test_endless_recursion_costs_its_episode() -> None:
    def deeper(self: Works, *arguments: object) -> Any:
        return deeper(self)

    for method in ("parse", "success"):
        ended = play_one(type("Deep", (Works,), {method: deeper}))
        assert isinstance(ended, DroppedEpisode) and "RecursionError" in ended.error


def test_a_config_error_is_still_one() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpus"):
        play_one(raising("step", ConfigError("data.corpus: no such file")))


def test_a_task_of_the_environment_cannot_end_the_run() -> None:
    class Starts(Works):
        async def step(self, action: str) -> StepResult:
            async def leaves() -> None:
                raise SystemExit(3)

            await asyncio.gather(leaves())
            return StepResult("down", True)

    ended = play_one(Starts)
    assert isinstance(ended, DroppedEpisode) and "raised SystemExit" in ended.error


def test_cancelling_an_episode_cancels_it() -> None:
    """Also where its environment catches what it is told."""

    class Stubborn(Works):
        async def step(self, action: str) -> StepResult:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                return StepResult("down", True)
            raise AssertionError

    async def cancelled() -> bool:
        stage = Stage(Stubborn, PROMPTER, SETTINGS)
        job = asyncio.create_task(play_episode(TASK, 0, stage, lambda t, i: Cast(Says(), Says()), Seeds(0, 0)))
        await asyncio.sleep(0.05)
        job.cancel()
        await asyncio.wait({job}, timeout=5)
        return job.cancelled()

    assert asyncio.run(cancelled())


# Texts


def long_step(text: str) -> type[Works]:
    return returning("step", StepResult(text, True))


def test_a_long_observation_is_cut_and_counted(tmp_path: Path) -> None:
    text = "up down " * 500
    ended = play_one(long_step(text), max_observation_tokens=40)
    assert isinstance(ended, Episode)
    turn = ended.attempts[0].turns[-1]
    kept = turn.observation.partition("\n[... ")[0]
    assert turn.observation.endswith(f"[... {turn.cut_chars} characters cut]") and text.startswith(kept)
    assert len(kept) + turn.cut_chars == len(text)
    assert 20 <= len(PROMPTER.encode_reply(turn.observation)) - 1 <= 40
    cut = rollout_metrics([ended], [], CreditReport((), 0, 0, 0, 0))["episodes/texts_cut"]
    assert cut == len(ended.attempts)
    write_dump(tmp_path, 1, [ended], [], PROMPTER.decode)
    assert read_episodes(tmp_path / "rollouts" / "step_000001.jsonl") == [ended]


def test_hints_and_summaries_are_cut_too() -> None:
    long = "up down " * 500
    ended = play_one(type("Long", (returning("hint", long), returning("summary", long)), {}), max_observation_tokens=40)
    assert isinstance(ended, Episode)
    attempt = ended.attempts[0]
    assert attempt.turns[0].cut_chars > 0 and attempt.summary_cut_chars > 0
    assert attempt.summary.endswith(f"[... {attempt.summary_cut_chars} characters cut]")


def test_a_summary_that_does_not_fit_the_critics_prompt_does_not_end_the_run() -> None:
    ended = play_one(returning("summary", "up down " * 500), max_observation_tokens=4000, context_tokens=120)
    assert isinstance(ended, Episode)
    assert len(ended.critiques[0].prompt_ids) < 120


@pytest.mark.parametrize("text", ["up " * 10, "\U0001f600" * 25, ""])
def test_a_text_within_the_limits_is_left_as_it_is(text: str) -> None:
    ended = play_one(long_step(text), max_observation_tokens=100, max_observation_bytes=100)
    assert isinstance(ended, Episode)
    assert (ended.attempts[0].turns[-1].observation, ended.attempts[0].turns[-1].cut_chars) == (text, 0)


@given(st.text(min_size=1, max_size=300), st.integers(4, 40))
def test_a_text_of_too_many_bytes_is_cut_between_characters(text: str, limit: int) -> None:
    environment = GuardedEnvironment(TASK, returning("summary", text), 60.0, limit)
    said = environment.summary()
    assert len(said.text.encode()) <= limit
    assert len(said.text) + said.missing == len(text)
    assert said.missing == 0 or len(said.text.encode()) > limit - 4


def test_a_problem_is_not_cut() -> None:
    ended = play_one(returning("reset", "up " * 1000), max_observation_bytes=2000)
    assert isinstance(ended, DroppedEpisode) and ended.bad_answer
    assert "rollout.max_observation_bytes = 2000" in ended.error


def test_an_action_is_not_cut() -> None:
    ended = play_one(returning("parse", "up " * 1000), max_observation_bytes=2000)
    assert isinstance(ended, DroppedEpisode) and "rollout.max_observation_bytes = 2000" in ended.error


@pytest.mark.parametrize("text", ["\ud800", "\u2028line\u0085line\x0b\x0c\x1c", "\x1b[2J\x00", "<|im_end|>"])
def test_texts_of_any_characters_are_written_and_read_again(tmp_path: Path, text: str) -> None:
    odd = [long_step(text), returning("summary", text), returning("parse", text), returning("hint", text)]
    ended = play_one(type("Odd", tuple(odd), {}))
    assert isinstance(ended, Episode)
    write_dump(tmp_path, 1, [ended], [], PROMPTER.decode)
    assert read_episodes(tmp_path / "rollouts" / "step_000001.jsonl") == [ended]


# Teachers and task sets


class Set:
    """A task set with a teacher, in which one thing is odd."""

    name = "set"

    def __init__(self, **odd: Any) -> None:
        self.odd = odd

    def problems(self, split: Split) -> Any:
        return self.odd["problems"]()

    def environment(self, task: Task) -> Any:
        return Works(task)

    def vocabulary(self) -> Any:
        return iter(["up"])

    def teacher(self, task: Task, rng: random.Random) -> Any:
        return self.odd.get("teacher", lambda: self)()

    def act(self, observation: str, critique: str | None) -> Any:
        return self.odd.get("act", lambda: "up")()

    def criticise(self, summary: str) -> Any:
        return self.odd.get("criticise", lambda: "up")()


@pytest.mark.parametrize("what", ["teacher", "act", "criticise"])
@pytest.mark.parametrize("value", [None, 3, b"up", Hostile, SystemExit(1), ValueError("no"), "\ud800"])
def test_a_teacher_that_fails_costs_its_demonstration(what: str, value: Any) -> None:
    def odd() -> Any:
        if isinstance(value, BaseException):
            raise value
        return Hostile() if value is Hostile else value

    made = Set(**{what: odd})
    stage = Stage(made.environment, PROMPTER, replace(SETTINGS, max_critique_tokens=8, max_turn_tokens=8))
    casting = teacher_casting(lambda name: made, PROMPTER, Seeds(0, 0), 60.0)
    episodes, dropped = asyncio.run(play([TASK], 1, stage, casting, Seeds(0, 0)))
    if value == "\ud800" and what != "teacher":
        assert len(episodes) == 1
    else:
        assert not episodes and what in dropped[0].error


def test_a_warm_start_without_any_demonstration_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Set(act=lambda: None)
    monkeypatch.setitem(registry._TASK_SETS, "set", lambda: made)  # type: ignore[arg-type]
    with pytest.raises(HopelessError, match=r"all 1 demonstrations failed; set/train/0: the teacher's act of task"):
        demonstrations([TASK], Stage(made.environment, PROMPTER, SETTINGS), Seeds(0, 0))


@pytest.mark.parametrize(
    ("problems", "said"),
    [
        (lambda: 1 / 0, r"task set 'set': problems\('train'\) raised ZeroDivisionError"),
        (lambda: None, r"problems\('train'\) raised TypeError"),
        (lambda: [TASK, "text"], r"problems\('train'\): entry 1 is 'text'"),
        (lambda: [replace(TASK, problem=json.loads("{}"))], r"entry 0 is Task\(.*texts"),
    ],
)
def test_a_task_set_that_has_no_problems_to_show_is_named(problems: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        registry.problems(Set(problems=problems), "train")


def test_a_task_set_whose_every_episode_is_wrong_is_named() -> None:
    good, bad = Task("good/0", "good", "heldout", ""), Task("bad/0", "bad", "heldout", "")
    wrong = DroppedEpisode(bad, 0, "outcome is nan", bad_answer=True)
    played = play_one(Works)
    assert isinstance(played, Episode)
    require_sound(Played((replace(played, task=good), replace(played, task=bad)), (wrong,)))
    require_sound(Played((), (replace(wrong, bad_answer=False), wrong)))
    with pytest.raises(ConfigError, match="no episode of task set 'bad' can be played: outcome is nan"):
        require_sound(Played((replace(played, task=good),), (wrong, wrong)))


def test_failures_keep_their_kind() -> None:
    for error, bad in ((EnvironmentFailure("gone"), False), (BadAnswer("nonsense"), True)):
        ended = play_one(raising("step", error))
        assert isinstance(ended, DroppedEpisode)
        assert (ended.error, ended.bad_answer) == (str(error), bad)
