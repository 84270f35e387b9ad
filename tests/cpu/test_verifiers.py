"""Published environments of the real package verifiers, and ones that fail, played through the adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attempts import observed
from package_environments import PYTHON, SCENARIO, criticised, needs_packages, write_words
from whole_runs import icrl

from icrl_megatron.run.time_checks import check_times
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import VerifiersSource
from icrl_megatron.settings.task_sections import RewardRange, VerifiersData
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure
from icrl_megatron.tasks.datasets import check_no_leak
from icrl_megatron.tasks.verifiers_env import VerifiersTasks
from icrl_megatron.utils.errors import ConfigError

# As the `wordle` of the Environments Hub does, this gives TextArenaEnv a rubric.
WORDLE = """
import verifiers as vf
from verifiers.envs.integrations.textarena_env import TextArenaEnv


def solved(completion, answer, **kwargs):
    return float(f"[{answer}]" in [m for m in completion if m.role == "assistant"][-1].content)


def load_environment(**args):
    return TextArenaEnv(game="Wordle-v0", rubric=vf.Rubric(funcs=[solved]), feedback_fn=last, **args)


def last(observation):
    return observation.rpartition("Feedback:")[2].strip()
"""

FRUIT = """
from korrel.exporters.verifiers import to_verifiers_env
from fruit_scenario import scenario


def load_environment():
    return to_verifiers_env(scenario)
"""

FAULTY = """
import os, time
import verifiers as vf
from datasets import Dataset


async def reward(completion, **kwargs):
    said = completion[-1].content
    if said == "raise":
        raise OSError("the judge is down")
    if said == "die":
        os._exit(1)
    if said == "hang":
        time.sleep(600)
    return float(said)


def failing_metric(completion, **kwargs):
    raise OSError("not needed")


def load_environment():
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    parts = [[{"type": "text", "text": f"question {i}"}, *([image] if i == 3 else [])] for i in range(4)]
    rows = [{"prompt": [{"role": "user", "content": content}], "answer": ""} for content in parts]
    rubric = vf.Rubric(funcs=[reward, failing_metric], weights=[1.0, 0.0])
    return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=rubric)
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: environments of our own, and the small data of published ones."""
    path = tmp_path_factory.mktemp("environments")
    modules = {"short_wordle": WORDLE, "fruit_env": FRUIT, "fruit_scenario": SCENARIO, "faulty": FAULTY}
    for name, text in modules.items():
        (path / f"{name}.py").write_text(text)
    write_words(path / "nltk", "apple", "house", "plant", "stone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("NLTK_DATA", str(path / "nltk"))
        yield path


def source(environment: str, args: dict[str, Any] | None = None, scale: RewardRange | None = None, **data: Any):  # type: ignore[no-untyped-def]
    given = {"python": str(PYTHON), "grading_workers": 1, "args": args or {}} | data
    return VerifiersSource(
        "verifiers", data=VerifiersData(environment=environment, **given), reward=scale or RewardRange()
    )


def tasks(*arguments: Any, **options: Any) -> VerifiersTasks:
    found = registry.of_source(source(*arguments, **options))
    assert isinstance(found, VerifiersTasks)
    return found


@pytest.fixture(scope="module")
def wordle() -> Iterator[VerifiersTasks]:
    made = tasks("short-wordle", {"num_train_examples": 30, "num_eval_examples": 2, "seed": 3}, max_turns=3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def faulty() -> Iterator[VerifiersTasks]:
    made = tasks("faulty", train=["0:3"], heldout=["3:4"], request_timeout_s=1.5)
    yield made
    made.close()


def play(task_set: VerifiersTasks, *replies: str, row: int = 0) -> tuple[list[str], Any]:
    environment = task_set.environment(task_set.problems("train")[row])
    return asyncio.run(observed(environment, *replies)), environment


@needs_packages
def test_reasoning_gym_with_its_own_scorer() -> None:
    task_set = tasks(
        "verifiers.envs.integrations.reasoninggym_env:ReasoningGymEnv",
        {"gym": "chain_sum", "num_train_examples": 6, "num_eval_examples": 3, "seed": 1},
        train=["0:2", "4:6"],
    )
    try:
        train, heldout = task_set.problems("train"), task_set.problems("heldout")
        check_no_leak(train, heldout)
        assert [len(train), len(heldout)] == [4, 3] and train[0].task_id == "verifiers/train/0:2/0"
        task_set.check()
        seen, environment = play(task_set, "no answer")
        assert "<answer>answer here</answer>" in seen[0] and environment.outcome() < 1.0
        sum_text = seen[0].rpartition("problem: ")[2].removesuffix(" =")
        _, environment = play(task_set, f"So <answer>{eval(sum_text)}</answer>")
        assert environment.success() and environment.outcome() == 1.0
        assert environment.measures()["check_answer_reward_func"] == 1.0
        # A dataset that changed since the problems were listed, because it has no seed.
        environment._row["digest"] = "of another row"
        with pytest.raises(EnvironmentFailure, match="of its dataset has changed; give the environment's args a seed"):
            asyncio.run(environment.reset())
    finally:
        task_set.close()


@needs_packages
def test_wordle_over_several_turns(wordle: VerifiersTasks) -> None:
    # Repeated words are one problem, and held-out words are not trained on: 4 words in all.
    train, heldout = wordle.problems("train"), wordle.problems("heldout")
    assert len(train) + len(heldout) == 4 and len(heldout) in (1, 2)
    guesses = [f"<guess>[{word}]</guess>" for word in ("apple", "house", "plant", "stone")]
    wins = []
    for guess in guesses:
        seen, environment = play(wordle, guess)
        if environment.success():
            wins.append(guess)
            assert "Congratulations" in seen[1] or seen[1], seen
        else:
            assert "You have 5 guesses left" in seen[1] and not environment.outcome()
    assert len(wins) == 1
    wrong = [guess for guess in guesses if guess != wins[0]]
    seen, environment = play(wordle, *wrong)
    # data.max_turns ends and scores the attempt, before the game does.
    assert len(seen) == 4 and "You have 3 guesses left" in seen[3]
    assert environment.outcome() == 0.0 and environment.measures()["num_turns"] == 3.0


@needs_packages
def test_a_critique_between_two_attempts(wordle: VerifiersTasks, tmp_path: Path) -> None:
    guesses = [f"<guess>[{word}]</guess>" for word in ("apple", "house", "plant", "stone")]
    won = next(guess for guess in guesses if play(wordle, guess)[1].success())
    wrong = [guess for guess in guesses if guess != won]
    episode = criticised(wordle, tmp_path, wrong, "Guess another word.", [wrong[0], won])
    assert [attempt.outcome for attempt in episode.attempts] == [0.0, 1.0]
    assert [len(attempt.turns) for attempt in episode.attempts] == [3, 2]
    assert "The reward is 0 after 3 turns" in episode.attempts[0].summary


@needs_packages
def test_an_environment_with_tools() -> None:
    task_set = tasks("fruit-env")
    try:
        with pytest.raises(ConfigError, match="has no train rows that are not held out; divide its rows"):
            task_set.problems("train")
        (task,) = task_set.problems("heldout")
        call = '<tool_call>{"name": "price", "arguments": {"fruit": "pear"}}</tool_call>'
        environment = task_set.environment(task)
        seen = asyncio.run(observed(environment, "<tool_call>{", f"I ask. {call}", "It costs 3 dollars."))
        assert seen[0].startswith("You sell fruit.\n\nWhat does a pear cost?\n\nTools:\n") and '"price"' in seen[0]
        assert seen[1] == "A <tool_call> is not closed: end it with </tool_call>." and seen[2] == "3 dollars"
        assert environment.success()
    finally:
        task_set.close()


@needs_packages
@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        ("raise", EnvironmentFailure, "its reward function reward: the judge is down"),
        ("7", BadAnswer, r"gave the reward 7\.0, which is not a number in \[0, 1\]"),
        ("nan", BadAnswer, "gave the reward nan"),
        ("die", EnvironmentFailure, "killed its process"),
    ],
)
def test_failures_are_never_rewards(faulty: VerifiersTasks, reply: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        play(faulty, reply)
    seen, environment = play(faulty, "", "0.5", row=1)
    assert seen == ["question 1", "The reply is empty.", ""] and environment.outcome() == 0.5
    # A metric without a weight may fail, as verifiers lets it.
    assert environment.measures()["failing_metric"] == 0.0 and not environment.success()


@needs_packages
def test_rows_that_cannot_be_played_are_refused(faulty: VerifiersTasks) -> None:
    with pytest.raises(ConfigError, match=r"verifiers/heldout/3:4/3: .* a message has a part of type image_url"):
        faulty.check()
    beyond = tasks("faulty", train=["0:9"], heldout=["3:4"])
    # A process takes seconds to start.
    beyond._rows.process, beyond._rows.counts = faulty._processes.first, faulty._rows.counts
    with pytest.raises(ConfigError, match=r"'0:9' is not a range of rows of .* which has 4 train rows"):
        beyond.problems("train")


@needs_packages
def test_a_step_that_hangs_is_ended(faulty: VerifiersTasks) -> None:
    with pytest.raises(EnvironmentFailure, match=r"took over 1\.5 s"):
        play(faulty, "hang")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": "wordle", "python": ""}, "No module named 'verifiers'; install its package"),
        ({"environment": "nowhere:make", "python": ""}, "No module named 'nowhere'"),
        ({"environment": "json:nothing", "python": ""}, "has no attribute 'nothing'"),
        ({"environment": "wordle", "python": "/nowhere/python"}, r"data\.python=/nowhere/python is no interpreter"),
        ({"environment": ""}, r"data\.environment is empty; name an environment that is installed"),
        ({"environment": "x", "scale": RewardRange(low=1.0)}, r"reward\.low=1 is not below reward\.high=1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks(**changes).problems("heldout")


def test_time_limits_are_compared() -> None:
    settings = Settings()
    settings.tasks.sources = [source("x", request_timeout_s=100.0)]
    with pytest.raises(ConfigError, match=r"data\.request_timeout_s=100: a step of the environment can take 100 s"):
        check_times(settings)
    settings.tasks.sources = [source("x", max_turns=31)]
    with pytest.raises(ConfigError, match=r"data\.max_turns=31 is more than rollout\.max_turns=30"):
        check_times(settings)


def test_an_unknown_environment_ends_the_command_before_a_model_is_loaded(tmp_path: Path) -> None:
    words = ("tasks.sources.0.name=verifiers", "tasks.sources.0.data.environment=nowhere:make", "model.path=/nowhere")
    code, _, error = icrl("train", "any_text", f"run_dir={tmp_path}", *words, "--dry-run")
    assert code == 2 and "No module named 'nowhere'" in " ".join(error.split()), error
