"""Long and unusual texts of environments are cut and counted; faulty teachers and task sets are reported by name."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_environments import PROMPTER, SETTINGS, TASK, Hostile, Works, play_one, raising, returning

from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.algo.headers import headers_of
from icrl_megatron.engines.rank import Share
from icrl_megatron.rollout.checked_environment import CheckedEnvironment
from icrl_megatron.rollout.episode import EpisodeSetup, play
from icrl_megatron.rollout.played import Played, RolloutRequest, require_playable
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.rollout.teacher import teacher_speakers
from icrl_megatron.run.watch import nothing_to_learn
from icrl_megatron.settings.schema import Settings
from icrl_megatron.sft import TeacherSource, constant_credit
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure, StepResult
from icrl_megatron.telemetry.dumps import Rollouts, write_dump
from icrl_megatron.telemetry.metrics import rollout_metrics
from icrl_megatron.types import DroppedEpisode, Episode, Split, Task
from icrl_megatron.utils.errors import ConfigError


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
    cut = rollout_metrics(headers_of([ended]), [], CreditReport((), 0, 0, 0, 0))["episodes/texts_cut"]
    assert cut == len(ended.attempts)
    write_dump(tmp_path, 1, [ended], [], PROMPTER.decode)
    assert Rollouts(tmp_path).episodes(1) == [ended]


def test_long_hints_and_summaries_are_cut() -> None:
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
def test_a_text_within_the_limits_is_not_changed(text: str) -> None:
    ended = play_one(long_step(text), max_observation_tokens=100, max_observation_bytes=100)
    assert isinstance(ended, Episode)
    assert (ended.attempts[0].turns[-1].observation, ended.attempts[0].turns[-1].cut_chars) == (text, 0)


@given(st.text(min_size=1, max_size=300), st.integers(4, 40))
def test_a_text_of_too_many_bytes_is_cut_between_characters(text: str, limit: int) -> None:
    environment = CheckedEnvironment(TASK, returning("summary", text), 60.0, limit)
    said = environment.summary()
    assert len(said.text.encode()) <= limit
    assert len(said.text) + said.missing == len(text)
    assert said.missing == 0 or len(said.text.encode()) > limit - 4


@pytest.mark.parametrize("method", ["reset", "parse"])
def test_problems_and_actions_are_not_cut(method: str) -> None:
    ended = play_one(returning(method, "up " * 1000), max_observation_bytes=2000)
    assert isinstance(ended, DroppedEpisode) and ended.bad_answer
    assert "rollout.max_observation_bytes = 2000" in ended.error


@pytest.mark.parametrize("text", ["\ud800", "\u2028line\u0085line\x0b\x0c\x1c", "\x1b[2J\x00", "<|im_end|>"])
def test_dumps_keep_texts_with_any_characters(tmp_path: Path, text: str) -> None:
    odd = [long_step(text), returning("summary", text), returning("parse", text), returning("hint", text)]
    ended = play_one(type("Odd", tuple(odd), {}))
    assert isinstance(ended, Episode)
    write_dump(tmp_path, 1, [ended], [], PROMPTER.decode)
    assert Rollouts(tmp_path).episodes(1) == [ended]


# Teachers and task sets


class Set:
    """A task set with a teacher and one fault."""

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
def test_a_teacher_that_fails_drops_its_demonstration(what: str, value: Any) -> None:
    def odd() -> Any:
        if isinstance(value, BaseException):
            raise value
        return Hostile() if value is Hostile else value

    made = Set(**{what: odd})
    setup = EpisodeSetup(made.environment, PROMPTER, replace(SETTINGS, max_critique_tokens=8, max_turn_tokens=8))
    speakers_for = teacher_speakers(lambda name: made, PROMPTER, Seeds(0, 0), 60.0)
    episodes, dropped = asyncio.run(play([TASK], 1, setup, speakers_for, Seeds(0, 0)))
    if value == "\ud800" and what != "teacher":
        assert len(episodes) == 1
    else:
        assert not episodes and what in dropped[0].error


def test_the_error_of_a_warm_start_without_demonstrations_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Set(act=lambda: None)
    monkeypatch.setitem(registry._TASK_SETS, "set", lambda: made)  # type: ignore[arg-type]
    source = TeacherSource(EpisodeSetup(made.environment, PROMPTER, SETTINGS), Share(0, 1))
    played = source.play(RolloutRequest([TASK], 1, Seeds(0, 0), 2))
    said = nothing_to_learn(Settings(), 0, played, constant_credit(played.headers))
    assert said.startswith("step 0: all 1 episodes were lost; set/train/0: the teacher's act of task")


@pytest.mark.parametrize(
    ("problems", "said"),
    [
        (lambda: 1 / 0, r"task set 'set': problems\('train'\) raised ZeroDivisionError"),
        (lambda: None, r"problems\('train'\) raised TypeError"),
        (lambda: [TASK, "text"], r"problems\('train'\): entry 1 is 'text'"),
        (lambda: [replace(TASK, problem=json.loads("{}"))], r"entry 0 is Task\(.*texts"),
    ],
)
def test_a_task_set_without_valid_problems_is_refused(problems: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        registry.problems(Set(problems=problems), "train")


def test_a_task_set_whose_episodes_are_all_dropped_is_refused() -> None:
    good, bad = Task("good/0", "good", "heldout", ""), Task("bad/0", "bad", "heldout", "")
    wrong = DroppedEpisode(bad, 0, "outcome is nan", bad_answer=True)
    played = play_one(Works)
    assert isinstance(played, Episode)
    require_playable(Played(headers_of([replace(played, task=good), replace(played, task=bad)]), (wrong,)))
    require_playable(Played((), (replace(wrong, bad_answer=False), wrong)))
    with pytest.raises(ConfigError, match="no episode of task set 'bad' can be played: outcome is nan"):
        require_playable(Played(headers_of([replace(played, task=good)]), (wrong, wrong)))


def test_bad_answers_are_distinguished_from_other_failures() -> None:
    for error, bad in ((EnvironmentFailure("gone"), False), (BadAnswer("nonsense"), True)):
        ended = play_one(raising("step", error))
        assert isinstance(ended, DroppedEpisode)
        assert (ended.error, ended.bad_answer) == (str(error), bad)
