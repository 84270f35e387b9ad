"""A user's reward function: what it is given, what it may return, and what its failures cost."""

from __future__ import annotations

import asyncio
import json
import math
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.run.time_checks import check_times
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import OwnSource
from icrl_megatron.settings.task_sections import MoreReward, OwnReward, Rows
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure
from icrl_megatron.tasks.reward_call import Graded, WeighedReward, WrongReward, total
from icrl_megatron.tasks.user_reward import RewardTasks
from icrl_megatron.utils.errors import ConfigError

GRADED = Graded("q", "reply", "a", "q", {"level": 3}, "answer")
TALK = [{"role": "user", "content": "q"}]


def reward(function: Any, graded: Graded = GRADED, low: float = 0.0, high: float = 1.0) -> float:
    return total([WeighedReward("f", function, 1.0)], graded, low, high).value


def test_parameters_are_passed_by_their_names() -> None:
    def every(prompt: str, response: str, label: str, **row: Any) -> float:
        return float((prompt, response, label, row) == ("q", "reply", "a", {"level": 3}))

    def column(label: str, level: int) -> float:
        return level / 4

    async def waits(response: str) -> float:
        await asyncio.sleep(0)
        return float(response == "reply")

    assert reward(every) == 1.0 and reward(column) == 0.75 and reward(waits) == 1.0


def test_functions_for_trl_work_unchanged() -> None:
    def plain(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert (prompts, completions, columns) == (["q"], ["reply"], {"level": [3], "answer": ["a"]})
        return [0.5]

    def talk(completions: list[list[dict[str, str]]], answer: list[str], **kwargs: Any) -> list[float]:
        return [float(one[0]["content"] == "reply" and kwargs["prompts"] == [TALK]) for one in completions]

    assert reward(plain) == 0.5
    assert reward(talk, Graded("q", "reply", "a", TALK, {}, "answer")) == 1.0
    with pytest.raises(WrongReward, match="a list with one number"):
        reward(lambda completions: 1.0)
    with pytest.raises(WrongReward, match="returned None"):
        reward(lambda completions: [None])


NUMBERS = st.one_of(st.floats(), st.integers(-3, 3), st.booleans(), st.floats(0, 1).map(np.float32))
OTHERS = st.one_of(st.none(), st.text(), st.lists(st.floats(0, 1)), st.just(np.ones(2)), st.binary())


@given(st.one_of(NUMBERS, OTHERS), st.booleans())
def test_only_a_number_in_range_is_a_reward(value: Any, in_dict: bool) -> None:
    function = (lambda response: {"score": value}) if in_dict else (lambda response: value)
    is_number = isinstance(value, bool | int | float | np.float32)
    if is_number and 0 <= float(value) <= 1:
        assert reward(function) == float(value)
    else:
        with pytest.raises(WrongReward):
            reward(function)


@given(st.lists(st.tuples(st.floats(-2, 3), st.floats(1e-3, 10)), min_size=1, max_size=4))
def test_several_rewards_are_a_weighted_mean_on_the_unit_scale(parts: list[tuple[float, float]]) -> None:
    rewards = [WeighedReward(f"f.py:r{i}", lambda v=value: v, weight) for i, (value, weight) in enumerate(parts)]
    found = total(rewards, GRADED, -2.0, 3.0)
    mean = sum(v * w for v, w in parts) / sum(w for _, w in parts)
    assert math.isclose(found.value, (mean + 2) / 5, abs_tol=1e-9) and 0 <= found.value <= 1
    assert len(found.measures) == (len(parts) if len(parts) > 1 else 0)


def test_other_numbers_of_a_dict_are_measures() -> None:
    found = total([WeighedReward("f", lambda: {"reward": 1, "n": 2, "text": "x"}, 1.0)], GRADED, 0.0, 1.0)
    assert (found.value, found.measures) == (1.0, {"n": 2.0})
    with pytest.raises(WrongReward, match="needs the reward under 'score'"):
        reward(lambda: {"points": 1})
    with pytest.raises(WrongReward, match="nan for 'n'"):
        reward(lambda: {"score": 1, "n": math.nan})


REWARDS = """
    import os, sys, time

    def score(prompt, response, label, **row):
        print("noise on standard output"); sys.stdin.read()
        if response == "raise":
            raise KeyError("x")
        if response == "hang":
            time.sleep(60)
        if response == "die":
            os._exit(3)
        if response == "nan":
            return float("nan")
        return {"score": float(response == label), "level": row["extra"]["level"]}

    def half(response):
        return 0.5

    def picky(response, label):
        return 1.0 / (len(response) - len(response))
    """


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rewards")
    (made / "reward.py").write_text(textwrap.dedent(REWARDS))
    for name, asked in (("train", "1+1"), ("heldout", "2+2")):
        rows = [{"question": [{"role": "user", "content": asked}], "answer": 7, "extra": {"level": 2}}]
        (made / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def source(folder: Path, function: str, **changes: Any) -> OwnSource:
    data = Rows([str(folder / "train.jsonl")], [str(folder / "heldout.jsonl")], "question", "answer")
    return OwnSource(f"{folder}/reward.py:{function}", data=data, reward=OwnReward(workers=1, **changes))


@pytest.fixture(scope="module")
def tasks(folder: Path) -> Iterator[RewardTasks]:
    made = registry.of_source(source(folder, "score", timeout_s=1.0))
    assert isinstance(made, RewardTasks)
    yield made
    made.rewards.close()


def play(tasks: RewardTasks, reply: str) -> tuple[float, bool, dict[str, float]]:
    environment: Any = tasks.environment(tasks.problems("heldout")[0])

    async def run() -> None:
        assert await environment.reset() == "2+2" == tasks.statement(tasks.problems("heldout")[0])
        action = environment.parse(reply)
        if action is not None:
            await environment.step(action)

    asyncio.run(run())
    return environment.outcome(), environment.success(), environment.measures()


def test_a_reply_is_rewarded_in_a_process(tasks: RewardTasks) -> None:
    assert play(tasks, "7") == (1.0, True, {"level": 2.0})
    assert play(tasks, "8") == (0.0, False, {"level": 2.0})
    assert play(tasks, "") == (0.0, False, {})


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        ("raise", EnvironmentFailure, r"raised KeyError: 'x' \(.*reward.py, line 7\)"),
        ("hang", EnvironmentFailure, "longer than 1 s"),
        ("die", EnvironmentFailure, "the process of .* died"),
        ("nan", BadAnswer, "returned the reward nan"),
    ],
)
def test_a_failure_costs_one_reply_only(tasks: RewardTasks, reply: str, kind: type[Exception], message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(kind, match=message):
        play(tasks, reply)
    assert time.monotonic() - begun < 10
    assert play(tasks, "7")[0] == 1.0


def test_weights_range_and_success_are_settings(folder: Path) -> None:
    more = [MoreReward(f"{folder}/reward.py:half", 3.0)]
    made = registry.of_source(source(folder, "score", more=more, low=-1.0, success=0.8))
    assert isinstance(made, RewardTasks)
    outcome, success, measures = play(made, "7")
    assert outcome == pytest.approx(((1 + 3 * 0.5) / 4 + 1) / 2) and success
    assert measures == {"level": 2.0, "reward_score": 1.0, "reward_half": 0.5}
    made.rewards.close()


def test_the_check_before_a_run_names_row_and_line(folder: Path) -> None:
    registry.of_source(source(folder, "score")).check()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"train.jsonl, line 1 .*ZeroDivisionError.*reward.py, line 20"):
        registry.of_source(source(folder, "picky")).check()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"reward\.low=1 is not below reward.high=1"):
        registry.of_source(source(folder, "score", low=1.0))
    settings = Settings()
    settings.tasks.sources = [source(folder, "score", timeout_s=100.0)]
    with pytest.raises(ConfigError, match=r"reward.timeout_s=100.*lower the first to 59.9"):
        check_times(settings)
