"""The control experiment with known success rates, and the statistics against their definitions."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.episode import EpisodeSetup
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.speakers import Ask, EmptyCritic, Seeds, Speaker, same_speakers
from icrl_megatron.rollout.teacher import teacher_speakers
from icrl_megatron.run.control import ControlResult, ControlState, control, paired_difference, proportion
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import StepResult
from icrl_megatron.types import Completion, Task

SETTINGS = RolloutSettings(templates="compact", context_tokens=256, concurrency=16)
SEEDS = Seeds(run=3, step=0, purpose="eval")
WORDS = ["question", "yes", "no", "help", "bad", "good", *template_words("compact")]
PROMPTER = Prompter(build_tokenizer(WORDS), SETTINGS)


class Question:
    """Succeeds with the answer `yes`; grading raises for tasks of source `broken`."""

    max_turns = 1

    def __init__(self, task: Task) -> None:
        self._task, self._answer = task, ""

    async def reset(self) -> str:
        return "question"

    def parse(self, reply: str) -> str | None:
        return reply

    def hint(self) -> str:
        return ""

    async def step(self, action: str) -> StepResult:
        self._answer = action
        return StepResult("", True)

    def outcome(self) -> float:
        return float(self.success())

    def success(self) -> bool:
        if self._task.source == "broken":
            raise OSError("grader is gone")
        return self._answer == "yes"

    def summary(self) -> str:
        return "good" if self.success() else "bad"


@dataclass(frozen=True)
class Coin:
    """Answers `yes` with probability `helped` after the critique `help`, else `alone`; its critiques are `help`."""

    alone: float
    helped: float

    async def reply(self, ask: Ask) -> Completion:
        if ask.role == "critique":
            text = "help"
        else:
            chance = self.helped if ask.critique == "help" else self.alone
            text = "yes" if random.Random(ask.seed).random() < chance else "no"
        ids = PROMPTER.encode_reply(text)
        return Completion(ids, (0.0,) * len(ids), "stop", 0)


def tasks(count: int, source: str = "coin") -> list[Task]:
    return [Task(f"{source}/{i}", source, "heldout", "") for i in range(count)]


SETUP = EpisodeSetup(Question, PROMPTER, SETTINGS)


def run_control(problems: list[Task], failures: int, solver: Speaker, critic: Speaker | None = None) -> ControlResult:
    speakers = same_speakers(solver, critic or solver)
    return asyncio.run(control(problems, failures, SEEDS, ControlState(), SETUP, speakers))


def test_the_control_measures_the_effect_of_the_critique() -> None:
    problems = [*tasks(600), *tasks(3, "broken")]
    result = run_control(problems, 300, Coin(0.3, 0.8))
    assert result.failures == result.critique.n == result.empty.n == result.plain.n == 300
    assert result.first_attempts == 600 and result.dropped == 3
    for arm, expected in ((result.critique, 0.8), (result.empty, 0.3), (result.plain, 0.3)):
        assert abs(arm.mean - expected) < 4 * math.sqrt(expected * (1 - expected) / 300)
    for difference in (result.critique_minus_empty, result.critique_minus_plain):
        assert 0 < difference.low < difference.mean < difference.high < 1
    assert result.critique_minus_empty.mean == pytest.approx(result.critique.mean - result.empty.mean)
    assert result.empty.successes != result.plain.successes  # independent samples, not one sample twice
    assert run_control(problems, 300, Coin(0.3, 0.8)) == result


def test_the_control_of_an_empty_critic_finds_no_effect() -> None:
    result = run_control(tasks(500), 300, Coin(0.3, 0.8), EmptyCritic())
    assert result.critique_minus_empty.low < 0 < result.critique_minus_empty.high


def test_without_failures_the_intervals_of_the_control_are_unbounded() -> None:
    result = run_control(tasks(5), 10, Coin(1.0, 1.0))
    assert result.failures == 0 and result.first_attempts == 5
    assert (result.critique.low, result.critique.high) == (0.0, 1.0)
    assert (result.critique_minus_plain.low, result.critique_minus_plain.high) == (-1.0, 1.0)


def test_results_can_be_written_as_json() -> None:
    plain = dataclasses.asdict(run_control(tasks(10), 5, Coin(0.3, 0.8)))
    assert json.loads(json.dumps(plain)) == json.loads(json.dumps(plain, allow_nan=False))


def test_the_control_plays_the_embedded_tasks() -> None:
    task_set = registry.get("household")
    tokenizer = build_tokenizer([*task_set.vocabulary(), *template_words("compact")])  # type: ignore[attr-defined]
    prompter = Prompter(tokenizer, SETTINGS)
    played = replace(SETUP, environment=registry.environment, prompter=prompter)
    speakers_for = teacher_speakers(registry.get, prompter, SEEDS)
    result = asyncio.run(control(task_set.problems("heldout"), 64, SEEDS, ControlState(), played, speakers_for))
    assert result.first_attempts == 64 and result.failures > 0
    assert result.critique.successes > result.empty.successes


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (1, 100, 0.0018, 0.0545)],
)
def test_wilson_intervals(successes: int, n: int, low: float, high: float) -> None:
    result = proportion(successes, n)
    assert (result.low, result.high) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_the_limits_of_the_score_test(case: tuple[int, int]) -> None:
    successes, n = case
    result = proportion(successes, n)
    assert 0 <= result.low <= result.mean <= result.high <= 1
    for bound in (result.low, result.high):
        if 0 < bound < 1:
            z = abs(result.mean - bound) / math.sqrt(bound * (1 - bound) / n)
            assert z == pytest.approx(1.959964, rel=1e-3) or min(bound, 1 - bound) < 1e-12


def test_the_bootstrap_interval_is_close_to_the_normal_interval() -> None:
    differences = np.random.default_rng(0).choice([-1, 0, 1], p=[0.1, 0.5, 0.4], size=400)
    result = paired_difference(differences)
    half = 1.96 * differences.std() / math.sqrt(len(differences))
    assert (result.low, result.high) == pytest.approx((result.mean - half, result.mean + half), abs=0.01)
    assert paired_difference(differences) == result
    assert paired_difference(np.ones(7)).low == 1.0
