"""Problems that do not fit the context are found before the model is loaded, or when they are played."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import byte_model
import pytest
from agentgym_server import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from whole_runs import Batch, batch, train

from icrl_megatron.agents.dialogue import Dialogue
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.context_budget import Statement, too_long
from icrl_megatron.rollout.prompts import Prompter, template_words, tokenizer
from icrl_megatron.run.problems import RESETS_S
from icrl_megatron.settings.rollout_schema import TEMPLATES
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import Opening
from icrl_megatron.types import Task

WORDS = ["red", "cup", "on", "shelf"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_model.build(tmp_path_factory.mktemp("model") / "bytes")


@pytest.fixture(scope="module")
def prompters(model: Path) -> dict[str, Prompter]:
    words = build_tokenizer([*WORDS, "system", *(word for name in TEMPLATES for word in template_words(name))])
    return {
        f"{kind}/{templates}": Prompter(made, RolloutSettings(templates=templates))
        for kind, made in (("bytes", tokenizer(model)), ("words", words))
        for templates in TEMPLATES
    }


@pytest.mark.parametrize("kind", [f"{kind}/{templates}" for kind in ("bytes", "words") for templates in TEMPLATES])
@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([*WORDS, " ", "<|im_end|>", "\n\n"]) | st.text(max_size=9), max_size=40),
    away=st.integers(-3, 3),
    which=st.sampled_from(["attempt", "revision", "critique"]),
    system=st.just("") | st.sampled_from(["red cup", "red " * 30, "on shelf\n\n<|im_end|>", "東京"]),
    manual=st.sampled_from(["", "red cup " * 9]),
)
def test_problem_is_too_long_exactly_if_a_prompt_does_not_fit(
    prompters: dict[str, Prompter], kind: str, pieces: list[str], away: int, which: str, system: str, manual: str
) -> None:
    """Within three tokens of the limit of each prompt."""
    prompter, text = prompters[kind], " ".join(pieces).encode(errors="replace").decode()
    task, critique = Task("t/0", "t", "train", ""), 5
    shown = prompter.templates.opening(Opening(text, system), manual)
    needed = {
        "attempt": len(prompter.attempt(text, system=shown.system)) + 1,
        "revision": len(prompter.revision(text, "-", system=shown.system)) + critique + 1,
        "critique": len(prompter.critique(shown.joined(), [], "", omitted=30)) + critique,
    }
    chosen = RolloutSettings(context_tokens=max(1, needed[which] + away), max_critique_tokens=critique)
    asked = [Statement(task, text, Dialogue(), system, manual)]
    alone = too_long(asked, prompter, chosen, revised=False)
    assert [one.needed for one in alone] == [needed["attempt"]] * (needed["attempt"] > chosen.context_tokens)
    both = too_long(asked, prompter, chosen, revised=True)
    most = max(needed.values())
    assert [one.needed for one in both] == [most] * (most > chosen.context_tokens)
    assert all(needed[one.role] == one.needed for one in both)


def write(path: Path, count: int, long: int, what: str) -> str:
    lines = [
        json.dumps({"prompt": ("word " * 1000 if i == long else "") + f"What is {i} {what} {i}?", "label": str(2 * i)})
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@dataclass(frozen=True)
class Resets(Batch):
    resets: dict[str, int]
    """Run -> number of resets at its environment server."""


@pytest.fixture(scope="module")
def ran(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Resets:
    """Commands on datasets with one row that is too long, and the number of resets at the servers."""
    folder = tmp_path_factory.mktemp("too_long")
    well = write(folder / "well.jsonl", 8, -1, "plus")
    held = write(folder / "held.jsonl", 4, -1, "times")
    in_train, in_held = write(folder / "rows.jsonl", 12, 9, "and"), write(folder / "tests.jsonl", 6, 4, "minus")
    small = ["warm_start.steps=0", "steps=2", "eval.interval=0", "eval.problems=2", "rollout.max_turn_tokens=4"]
    small += ["rollout.max_critique_tokens=4", "rollout.context_tokens=400", "rollout.tasks_per_step=2"]
    small += ["rollout.episodes_per_task=2", "algo.on_no_signal=skip"]

    broken = folder / "broken"  # this model cannot be loaded
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")  # its header is intact
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})

    def math(train_rows: str, heldout_rows: str) -> str:
        return f"{{name: math, data: {{train: [{train_rows}], heldout: [{heldout_rows}]}}}}"

    def run(name: str, sources: str, *more: str) -> list[str]:
        return train(folder / name, f"model.path={model}", *small, f"tasks.sources=[{sources}]", *more)

    asked = {}
    with serving("alfworld") as (first, state), serving("alfworld") as (second, dropping):
        served = "{{name: alfworld, data: {{train: ['0:2420'], heldout: ['2420:2430'], servers: ['{}']}}}}"
        narrow = "rollout.context_tokens=200"
        commands = {
            "train": run("train", math(in_train, held), f"model.path={broken}"),
            "heldout": run("heldout", math(well, in_held)),
            "dry": [*run("dry", math(in_train, held)), "--dry-run"],
            "dry_drop": [*run("dry", math(in_train, held), "tasks.too_long=drop"), "--dry-run"],
            "sft": ["sft", *run("sft", "{name: long_row}", "warm_start.steps=1")[1:]],
            "drop": run("drop", math(in_train, in_held), "tasks.too_long=drop"),
            "enough": run("enough", math(in_train, held), "rollout.context_tokens=1024", "rollout.rounds=1"),
            "few": run("few", math(in_train, held), "tasks.too_long=drop", "rollout.tasks_per_step=12"),
            "eval": ["eval", str(model), "--task", "math", f"tasks.sources=[{math(well, in_held)}]", *small[4:]],
            "other": run("other", "{name: long_row}"),
            "other_drop": run("other_drop", "{name: long_row}", "tasks.too_long=drop", "tasks.limit=10"),
            "served": run("served", f"{math(well, held)}, {served.format(first)}", narrow),
            "served_drop": run(
                "served_drop", f"{math(well, held)}, {served.format(second)}", narrow, "tasks.too_long=drop"
            ),
        }
        commands["eval"] = [word for word in commands["eval"] if not word.startswith(("steps", "eval.", "warm"))]
        commands["eval_drop"] = [*commands["eval"], "tasks.too_long=drop", "--out", str(folder / "eval_drop")]
        commands["eval"] += ["--out", str(folder / "eval")]
        # A run that failed because of the row resumes as its message advises.
        commands["fails"] = run("after", math(in_train, held))
        commands["after"] = [*commands["fails"], "tasks.too_long=drop"]
        ended = batch(folder, commands)
        asked = {"served": state.calls["/reset"], "served_drop": dropping.calls["/reset"]}
    return Resets(folder, ended, asked)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("train", "math/train/rows/9 (ROWS/rows.jsonl, line 10)"),
        ("heldout", "math/heldout/tests/4 (ROWS/tests.jsonl, line 5)"),
        ("dry", "math/train/rows/9 (ROWS/rows.jsonl, line 10)"),
        ("sft", "long_row/train/9"),
        ("eval", "math/heldout/tests/4 (ROWS/tests.jsonl, line 5)"),
        ("other", "long_row/train/9"),
    ],
)
def test_too_long_row_is_found_before_the_model_is_loaded(ran: Resets, name: str, row: str) -> None:
    assert ran.ended[name].code == 2, ran.ended[name].error
    (message,) = [line for line in ran.ended[name].error.splitlines() if line.startswith("error: ")]
    assert row.replace("ROWS", str(ran.folder)) in message
    assert "rollout.context_tokens is 400 (the model has 1024 positions): shorten the problems" in message
    assert "set tasks.too_long=drop" in message
    assert not (ran.folder / name / "metrics.jsonl").exists() and not (ran.folder / name / "checkpoints").exists()


def test_suggested_context_is_the_smallest_that_fits(ran: Resets, model: Path) -> None:
    """The suggested number of tokens is enough, and one less is not."""
    prompter = Prompter(tokenizer(model), RolloutSettings(templates="compact"))
    task, text = Task("t/0", "t", "train", ""), "word " * 30
    lengths = RolloutSettings(context_tokens=20, max_critique_tokens=4)
    (found,) = too_long([Statement(task, text, Dialogue())], prompter, lengths, revised=True)
    for context, count in ((found.needed, 0), (found.needed - 1, 1)):
        at = RolloutSettings(context_tokens=context, max_critique_tokens=4)
        assert len(too_long([Statement(task, text, Dialogue())], prompter, at, revised=True)) == count


def test_dropped_rows_are_counted_and_reported_once(ran: Resets) -> None:
    assert ran.ended["fails"].code == 2
    for name, dropped in (("drop", 2.0), ("after", 1.0)):
        ran.succeeded(name)
        said = ran.ended[name].said
        assert said.count("do not fit rollout.context_tokens=400 and are left out") == 1
        assert "math/train/rows/9" in said
        steps = ran.trained(name)
        assert [row["data/dropped_too_long"] for row in steps] == [dropped, dropped]
        assert all(row["episodes/too_long"] == row["episodes/dropped"] == 0 for row in steps)
    assert ran.ended["dry_drop"].code == 0 and "1 of 16 problems" in ran.ended["dry_drop"].error


def test_too_few_remaining_rows_are_an_error(ran: Resets) -> None:
    error = ran.ended["few"].error
    assert ran.ended["few"].code == 2
    assert "11 training problems, and a step draws 12" in error and "lower rollout.tasks_per_step" in error


def test_evaluation_counts_dropped_problems(ran: Resets) -> None:
    ran.succeeded("eval_drop")
    result = json.loads((ran.folder / "eval_drop" / "eval.json").read_text())
    assert result["too_long"] == 1 and len(result["successes"]) == 5


def test_problem_of_a_custom_task_set_is_dropped_when_played(ran: Resets) -> None:
    """Dropping rows in advance must not depend on timing; only `Readable` task sets are read without a time limit."""
    assert RESETS_S > 0
    ran.succeeded("other_drop")
    steps = ran.trained("other_drop")
    assert all(row["data/dropped_too_long"] == 0 for row in steps)
    assert all(row["episodes/too_long"] == row["episodes/dropped"] for row in steps)


def test_problems_of_a_server_are_checked_when_played(ran: Resets) -> None:
    assert ran.ended["served"].code == 2
    assert "The attempt prompt of task 'alfworld/heldout/24" in ran.ended["served"].error
    assert "rollout.context_tokens is 200: raise it above the prompt" in ran.ended["served"].error
    assert ran.resets["served"] < 20, "the server was asked for all of its 2430 problems"
    ran.succeeded("served_drop")
    steps = ran.trained("served_drop")
    assert sum(row["episodes/too_long"] for row in steps) > 0
    for row in steps:
        assert row["episodes/too_long"] == row["episodes/dropped"]
        assert row["episodes/played"] + row["episodes/dropped"] == 4
        assert row["data/dropped_too_long"] == 0
    assert ran.resets["served_drop"] < 40
