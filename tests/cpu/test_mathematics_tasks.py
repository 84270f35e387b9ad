"""The task set of mathematics: its attempts, and its dataset files."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

import pyarrow as pa
import pyarrow.parquet as pq

from icrl_megatron.model.tiny import build_byte_tokenizer
from icrl_megatron.rollout.episode import EpisodeSetup, play_episode
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import Ask, EmptyCritic, Seeds, Speakers
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import MathSource
from icrl_megatron.settings.task_sections import ToolAgent, ToolData
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Checked
from icrl_megatron.tasks.datasets import check_no_leak, subset_of
from icrl_megatron.tasks.mathematics import Mathematics
from icrl_megatron.types import Attempt, Completion, Episode
from icrl_megatron.utils.errors import ConfigError


async def test_environment_grades_one_reply(tmp_path: Path) -> None:
    source = dataset(tmp_path, [{"prompt": "2+3?", "label": "5"}])
    task_set = registry.of_source(source)
    environment = task_set.environment(task_set.problems("train")[0])

    async def attempt(reply: str) -> tuple[str, bool, float, str]:
        problem = await environment.reset()
        action = environment.parse(reply)
        if action is not None:
            assert (await environment.step(action)).done
        return problem, environment.success(), environment.outcome(), environment.summary()

    problem, success, outcome, summary = await attempt(r"so \boxed{4}, no, \boxed{5}")
    assert (success, outcome) == (True, 1.0) and problem.startswith("2+3?") and "\\boxed" in problem
    assert "right" in summary
    _, success, outcome, summary = await attempt(r"\boxed{6}")
    assert (success, outcome) == (False, 0.0) and "6 is wrong" in summary and "5" not in summary
    _, success, _, summary = await attempt("5")
    assert not success and "\\boxed" in summary


def played(tmp_path: Path, replies: list[str], **changes: int) -> Attempt:
    """An attempt at 2+3 with these replies. `changes`: options of the task set, and `max_turns` of rollout."""
    most = changes.pop("max_turns", 30)
    task_set = registry.of_source(replace(dataset(tmp_path, [{"prompt": "2+3?", "label": "5"}]), **changes))
    settings = RolloutSettings(rounds=1, templates="compact", context_tokens=4096, max_turns=most)
    prompter = Prompter(build_byte_tokenizer(), settings)
    said = iter(replies)

    class Solver:
        async def reply(self, ask: Ask) -> Completion:
            ids = prompter.encode_reply(next(said))
            return Completion(ids, (-1.0,) * len(ids), "stop", 0)

    setup = EpisodeSetup(task_set.environment, prompter, settings)
    (task,) = task_set.problems("train")
    speakers = Speakers(Solver(), EmptyCritic())
    episode = asyncio.run(play_episode(task, 0, setup, lambda task, index: speakers, Seeds(0, 0)))
    assert isinstance(episode, Episode), episode
    assert not list(said)  # every reply was asked for
    return episode.attempts[0]


NO_BOX = "There is no answer in \\boxed{}."


@pytest.mark.parametrize(
    ("replies", "changes", "stop", "right"),
    [
        (["It is 5.", r"So \boxed{5}."], {}, "done", True),
        (["5", "five", r"\boxed{6}"], {}, "done", False),
        (["5"], {"answer_turns": 1}, "max_turns", False),
        (["5", r"\boxed{5}"], {"answer_turns": 2}, "done", True),
        (["5", "5", "5"], {"answer_turns": 3}, "max_turns", False),
        (["5"] * 4, {"max_turns": 4}, "max_turns", False),
        (["5"] * 30, {"max_turns": 50}, "max_turns", False),
    ],
)
def test_an_attempt_ends_with_a_box(
    tmp_path: Path, replies: list[str], changes: dict[str, int], stop: str, right: bool
) -> None:
    attempt = played(tmp_path, replies, **changes)
    assert (attempt.stop_reason, attempt.success, attempt.outcome) == (stop, right, float(right))
    ends = [""] if stop == "done" else []
    assert [turn.observation for turn in attempt.turns] == [NO_BOX] * (len(replies) - len(ends)) + ends


def test_turns_of_answers_are_an_option_of_mathematics_without_tools(tmp_path: Path) -> None:
    source = dataset(tmp_path, [{"prompt": "2+3?", "label": "5"}])
    source.agent.tools = ["calculator"]
    registry.of_source(source)
    with pytest.raises(ConfigError, match=r"answer_turns=2 has no effect with agent\.tools; leave it out"):
        registry.of_source(replace(source, answer_turns=2))
    with pytest.raises(ConfigError, match="answer_turns=0: must be"):
        registry.of_source(replace(source, agent=ToolAgent(), answer_turns=0))
    for preset in ("paper", "reference"):
        (math,) = load("qwen3_8b_math_4xh100", [f"algo.preset={preset}"]).tasks.sources
        assert isinstance(math, MathSource) and math.answer_turns == 30
    with pytest.raises(ConfigError, match="answer_turns"):
        load("qwen3_8b_math_4xh100", ["tasks.sources=[{name: code, answer_turns: 2}]"])


# Dataset files


def dataset(folder: Path, train: list[dict], heldout: list[dict] | None = None, **data: object) -> MathSource:  # type: ignore[type-arg]
    names = {}
    for split, rows in (("train", train), ("heldout", heldout or [{"prompt": "held?", "label": "1"}])):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        names[split] = [str(path)]
    return MathSource("math", data=ToolData(**{**names, **data}))  # type: ignore[arg-type]


def test_prompt_may_be_a_list_of_messages(tmp_path: Path) -> None:
    source = dataset(tmp_path, [{"prompt": [{"role": "user", "content": "What is 1+1?"}], "label": "2"}])
    (task,) = Mathematics(source).problems("train")
    assert task.task_id == "math/train/train/0" and subset_of(task) == "math/train"
    assert json.loads(task.problem)["prompt"] == "What is 1+1?"


def test_parquet_and_arrow_files_are_read(tmp_path: Path) -> None:
    table = pa.table({"question": ["a?", "b?"], "answer": [1.0, 2.5]})
    pq.write_table(table, tmp_path / "aime.parquet")
    saved = tmp_path / "minerva"
    saved.mkdir()
    with pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as to:
        to.write_table(pa.table({"question": ["c?"], "answer": [3.0]}))
    train, heldout = [str(tmp_path / "aime.parquet")], [str(saved)]
    data = ToolData(train=train, heldout=heldout, prompt_column="question", label_column="answer")
    task_set = Mathematics(MathSource("math", data=data))
    assert [json.loads(t.problem)["label"] for t in task_set.problems("train")] == ["1", "2.5"]
    assert [t.task_id for t in task_set.problems("heldout")] == ["math/heldout/minerva/0"]


GOOD = {"prompt": "q?", "label": "1"}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([GOOD, {"prompt": "r?"}], ["train.jsonl, line 2", "no column 'label'", "data.label_column"]),
        ([{"prompt": " ", "label": "1"}], ["train.jsonl, line 1", "'prompt' is empty"]),
        ([{"prompt": "r?", "label": None}], ["line 1", "'label' is empty"]),
        ([GOOD, {"prompt": "s?", "label": "2"}, {"prompt": "Q? ", "label": "1"}], ["line 3", "same prompt", "line 1"]),
        (
            [{"prompt": [{"role": "assistant", "content": "x"}], "label": "1"}],
            ["line 1", "assistant", "remove the others"],
        ),
        ([], ["no rows"]),
        ([GOOD, {"prompt": "bad?", "label": "\\begin{cases}"}], ["line 2", "label", "not an answer"]),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, rows: list[dict[str, object]], parts: list[str]) -> None:
    task_set = registry.of_source(dataset(tmp_path, rows))
    assert isinstance(task_set, Checked)
    with pytest.raises(ConfigError) as raised:
        task_set.problems("train")
        task_set.check()
    assert all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["line 1", "not JSON"]),
        ('{"prompt": "a", "label": "1"}\n\n', ["line 2", "empty line"]),
        ("[1]", ["object"]),
    ],
)
def test_damaged_files_are_reported_with_file_and_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    source = dataset(tmp_path, [GOOD])
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ConfigError) as raised:
        Mathematics(source).problems("train")
    assert all(part in str(raised.value) for part in parts), raised.value


def test_missing_and_unsupported_files_are_rejected(tmp_path: Path) -> None:
    for name, message in (("gone.jsonl", "no such file"), ("rows.csv", "not .csv")):
        (tmp_path / "rows.csv").write_text("a,b")
        with pytest.raises(ConfigError, match=message):
            Mathematics(MathSource("math", data=ToolData(train=[str(tmp_path / name)]))).problems("train")
    with pytest.raises(ConfigError, match=r"data\.train"):
        Mathematics(MathSource("math")).problems("train")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="damaged"):
        Mathematics(MathSource("math", data=ToolData(train=[str(tmp_path / "cut.parquet")]))).problems("train")


def test_heldout_problem_in_the_training_set_is_rejected(tmp_path: Path) -> None:
    rows = [{"prompt": "What is 2 + 2?", "label": "4"}, {"prompt": "And 3?", "label": "3"}]
    # A problem with a different label, spacing and capitalization is still the same problem.
    task_set = Mathematics(dataset(tmp_path, rows, [{"prompt": "what  is 2 + 2?", "label": "5"}]))
    with pytest.raises(ConfigError, match=r"1 held-out problems are training problems too.*math/heldout/heldout/0"):
        check_no_leak(task_set.problems("train"), task_set.problems("heldout"))
