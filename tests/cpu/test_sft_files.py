"""Supervised training on files by the real program: formats, held-out loss, early stop, grids, resume, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import byte_model
import pytest
import torch
from safetensors.torch import load_file
from trajectory_files import LOGS, ROWS, alpaca, openai, rows_of, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_runs import Batch, batch, icrl, rows

from icrl_megatron.actor.optimizer import STATES
from icrl_megatron.algo.schedules import learning_rate
from icrl_megatron.run.conversation_checks import DATA_RECIPE, as_recipe
from icrl_megatron.settings.loading import load
from icrl_megatron.utils.step_names import step_name
from icrl_recipes import registry

FORMATS = (*ROWS, *LOGS)
MIXED = "[{path: %s/masked.jsonl, weight: 2}, {path: %s/afm.jsonl, tool_format: tags}, {path: %s/oagents.jsonl}]"
WHOLE = ("warm_start.steps=6", "warm_start.heldout=0.25", "warm_start.heldout_interval=2", "warm_start.patience=3")
WORSE = (
    "warm_start.steps=9", "warm_start.warmup_steps=20", "warm_start.learning_rate=2", "warm_start.schedule=constant",
    "warm_start.heldout_interval=1", "checkpoint.interval=1", "checkpoint.keep=1",
)  # fmt: skip
"""The learning rate rises until the loss does, and only the newest checkpoint is kept."""
GRIDS = {
    "data": ("launch.ranks=2",),
    "tensor": ("launch.ranks=2", "actor.tensor_parallel=2", "actor.sequence_parallel=true"),
    "pipeline": ("launch.ranks=2", "actor.pipeline_parallel=2"),
}


class Ran(Batch):
    def rows(self, name: str) -> list[dict[str, float]]:
        return rows(self.folder / name / "warm_start")

    def start(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / "bytes", dtype=torch.bfloat16)

    def weights(self, name: str) -> bytes:
        return (self.folder / name / "warm_start/hf/model.safetensors").read_bytes()


def of_file(root: Path, name: str, data: str, *overrides: str) -> list[str]:
    """`icrl sft DATA` with the defaults of its recipe, but for a tiny model and steps of 4 conversations."""
    fixed = [f"run_dir={root / name}", f"model.path={root / 'bytes'}", "launch.device=cpu"]
    lengths = [f"rollout.{name}=100" for name in ("max_turn_tokens", "max_critique_tokens")]
    small = ["warm_start.episodes_per_step=4", "warm_start.epochs=1", "rollout.context_tokens=2048", *lengths]
    return ["sft", f"{root}/{data}", *fixed, *small, *overrides]


def sft(root: Path, name: str, data: str, *overrides: str) -> list[str]:
    """A run in root/name on the byte model."""
    fixed = [f"run_dir={root / name}", f"model.path={root / 'bytes'}", "model.init=null", "rollout.context_tokens=1024"]
    small = ["warm_start.episodes_per_step=4", "warm_start.warmup_steps=0", "launch.device=cpu", "warm_start.steps=2"]
    return ["sft", "rulebook_easy", *fixed, *small, f"warm_start.data={data.replace('%s', str(root))}", *overrides]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("sft")
    folder = byte_model.build(root / "bytes", positions=2048, layers=2, kv_heads=2)
    byte_model.use_template(folder, "qwen2_5")  # its own has no tools
    for name in FORMATS:
        write_jsonl(root / f"{name}.jsonl", rows_of(name, 12))
    (root / "list.json").write_text(json.dumps([alpaca(n) for n in range(12)]), encoding="utf-8")
    long = openai(99)
    long["messages"][-1]["content"] = "long " * 300
    write_jsonl(root / "rough.jsonl", [*(openai(n) for n in range(6)), {"messages": []}, long])
    write_jsonl(root / "other.jsonl", [openai(n) for n in range(50, 53)])
    masked = [openai(n) for n in range(12)]
    for row in masked:
        row["messages"][2]["weight"] = 0
    write_jsonl(root / "masked.jsonl", masked)
    (root / "many").mkdir()
    for n in range(12):
        write_jsonl(root / "many" / f"{n}.jsonl", [openai(n)])
    mixed, of_one = MIXED.replace("%s", str(root)), "[{path: %s/openai.jsonl}]"
    rough, drop = "[{path: %s/rough.jsonl}]", "warm_start.bad_rows=drop"
    commands = {name: of_file(root, name, f"{name}.jsonl") for name in FORMATS if name != "afm"}
    commands |= {
        "afm": of_file(root, "afm", "afm.jsonl", "warm_start.data.0.tool_format=tags"),
        "list": of_file(root, "list", "list.json", "warm_start.epochs=1.5"),
        "pattern": of_file(root, "pattern", "many/*.jsonl"),
        "whole": sft(root, "whole", mixed, *WHOLE),
        "broken": ["fault=sft@3", *sft(root, "broken", mixed, *WHOLE)],
        "resumed": sft(root, "broken", mixed, *WHOLE),
        "early": sft(
            root, "early", of_one, f"warm_start.heldout={root}/other.jsonl", "warm_start.heldout_interval=1",
            "warm_start.patience=2", "warm_start.steps=50", "warm_start.learning_rate=3",
        ),
        "worse": sft(root, "worse", of_one, f"warm_start.heldout={root}/other.jsonl", *WORSE),
        "worse, broken": ["fault=sft@7", *sft(root, "again", of_one, f"warm_start.heldout={root}/other.jsonl", *WORSE)],
        "worse, resumed": sft(root, "again", of_one, f"warm_start.heldout={root}/other.jsonl", *WORSE),
        "dropped": sft(root, "dropped", rough, drop, "warm_start.too_long=drop"),
        "cut": sft(root, "cut", rough, drop, "warm_start.too_long=cut", "warm_start.max_tokens=950"),
        "bad": sft(root, "bad", rough),
        "long": sft(root, "long", rough, drop),
        "leak": sft(root, "leak", of_one, f"warm_start.heldout={root}/openai.jsonl"),
        "missing": sft(root, "missing", "[{path: %s/no.jsonl}]"),
        "share": sft(root, "share", of_one, "warm_start.heldout=1.5"),
        "no data": sft(root, "no", "[]", "warm_start.heldout=0.1"),
        "both": sft(root, "both", of_one, "warm_start.epochs=1"),
        "patience": sft(root, "no", of_one, "warm_start.patience=1"),
        "positions": sft(root, "no", of_one, "warm_start.max_tokens=5000"),
        "over": sft(root, "whole", mixed, *WHOLE, "warm_start.learning_rate=1"),
    }  # fmt: skip
    return Ran(root, batch(root, commands))


@pytest.mark.parametrize("name", [*FORMATS, "list", "pattern"])
def test_every_format_is_trained_and_exported(ran: Ran, name: str) -> None:
    ran.succeeded(name)
    found = ran.rows(name)
    assert [row["step"] for row in found] == [1, 2, 3] if name != "list" else [1, 2, 3, 4, 5]
    # Random weights are near the uniform distribution over 270 tokens, and the loss falls from there.
    assert abs(found[0]["sft/nll"] - math.log(270)) < 0.3 and all(row["data/dropped"] == 0 for row in found)
    folder = ran.folder / name / "warm_start/hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) and model.dtype == torch.bfloat16
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), ran.start().parameters(), strict=True))


def test_the_rate_follows_the_schedule_of_the_recipe(ran: Ran) -> None:
    warm = load(DATA_RECIPE).warm_start
    assert (warm.epochs, warm.schedule, warm.learning_rate) == (2, "cosine", 1e-5)
    for name, steps in (("openai", 3), ("list", 5)):
        rates = [row["actor/learning_rate"] for row in ran.rows(name)]
        assert rates == pytest.approx([learning_rate(step, steps, warm) for step in range(steps)])


def test_a_file_becomes_a_run_of_the_recipe_and_overrides() -> None:
    recipes = registry()
    assert as_recipe("quickstart", recipes) == ("quickstart", [])
    assert as_recipe("nothing", recipes) == ("nothing", [])
    assert as_recipe("a/my traces.jsonl", recipes) == (
        DATA_RECIPE, ["name=my_traces", "warm_start.data.0.path=a/my traces.jsonl"],
    )  # fmt: skip
    assert as_recipe("a/*.parquet", recipes)[1][0] == "name=a"
    code, out, error = icrl("sft", "gone.jsonl", "seed=3", "--dry-run")
    assert code == 2 and "name: gone\n" in out and "seed: 3\n" in out and "gone.jsonl: no such file" in error


def test_held_out_loss_is_measured_before_while_and_after(ran: Ran) -> None:
    ran.succeeded("whole")
    measured = [(row["step"], row["heldout/nll"]) for row in ran.rows("whole") if "heldout/nll" in row]
    assert [step for step, _ in measured] == [0, 2, 4, 6] and measured[-1][1] < measured[0][1]
    assert [row["step"] for row in ran.rows("whole")] == list(range(7))


def test_a_resumed_run_is_the_same_run(ran: Ran) -> None:
    assert ran.ended["broken"].code == 1 and ran.ended["resumed"].code == 0, ran.ended["resumed"].error
    assert "resuming from" in ran.ended["resumed"].error
    assert ran.rows("broken") == ran.rows("whole") and ran.weights("broken") == ran.weights("whole")


def test_training_ends_when_the_held_out_loss_stops_falling(ran: Ran) -> None:
    ran.succeeded("early")
    losses = [row["heldout/nll"] for row in ran.rows("early")]
    assert 3 <= len(losses) < 50 and (ran.folder / "early/warm_start/hf/config.json").exists()
    assert min(losses[-2:]) >= min(losses[:-2])
    assert all(min(losses[: n - 1]) > min(losses[n - 1 : n + 1]) for n in range(2, len(losses) - 1))


def test_the_weights_with_the_lowest_held_out_loss_are_exported(ran: Ran) -> None:
    """Also by a run that failed after that step, and resumed."""
    assert ran.ended["worse"].code == 0 and ran.ended["worse, broken"].code == 1, ran.ended["worse"].error
    losses = {row["step"]: row["heldout/nll"] for row in ran.rows("worse") if row["step"] > 0}
    best = min(losses, key=lambda step: losses[step])
    assert 1 <= best < 7 and ran.rows("again") == ran.rows("worse")
    for name, command in (("worse", "worse"), ("again", "worse, resumed")):
        said = ran.ended[command].said
        assert f"weights of step {best:.0f} of 9, with the lowest held-out loss ({losses[best]:.4f})" in said
        checkpoints = ran.folder / name / "warm_start/checkpoints"
        assert sorted(p.name for p in checkpoints.iterdir()) == [step_name(int(best)), step_name(9)]
        saved = load_file(checkpoints / step_name(int(best)) / "rank_00000_0000.safetensors")
        for tensor, value in load_file(ran.folder / name / "warm_start/hf/model.safetensors").items():
            assert torch.equal(value, saved[f"{STATES[0]}/{tensor}"].view_as(value))


def test_a_best_checkpoint_that_is_damaged_or_gone(ran: Ran, tmp_path: Path) -> None:
    """The run was ended between its last checkpoint and the export."""
    commands = {}
    for name in ("damaged", "gone"):
        shutil.copytree(ran.folder / "worse", ran.folder / name)
        shutil.rmtree(ran.folder / name / "warm_start/hf")
        best = ran.folder / name / "warm_start/checkpoints/step_000001"
        (best / "rank_00000_0000.safetensors").write_bytes(b"")
        if name == "gone":
            shutil.rmtree(best)
        other = f"warm_start.heldout={ran.folder}/other.jsonl"
        commands[name] = sft(ran.folder, name, "[{path: %s/openai.jsonl}]", other, *WORSE)
    ended = batch(tmp_path, commands)
    assert ended["damaged"].code == 2 and "step_000001: damaged" in ended["damaged"].error
    assert "Or move it away: the same command then exports" in ended["damaged"].said
    assert ended["gone"].code == 0 and "weights of step 9 of 9" in ended["gone"].said


def test_rows_are_dropped_and_counted_or_cut(ran: Ran) -> None:
    for name, dropped in (("dropped", 2), ("cut", 1)):
        ran.succeeded(name)
        assert [row["data/dropped"] for row in ran.rows(name)] == [dropped] * 2
    assert "1 of 8 rows cannot be trained on" in ran.ended["dropped"].said


REFUSED = {
    "bad": ("rough.jsonl, line 7: `messages` is '[]', not a list of messages", "set warm_start.bad_rows=drop"),
    "long": ("rough.jsonl, line 8 with", "Raise rollout.context_tokens (the model has 2048 positions), or set"),
    "leak": ("this held-out problem is trained on too", "openai.jsonl, line 1"),
    "missing": ("no.jsonl: no such file", ".jsonl, .json, .parquet, .arrow"),
    "share": ("warm_start.heldout=1.5: give a fraction between 0 and 1, or a file",),
    "no data": ("warm_start.heldout=0.1 needs conversations: set warm_start.data=[{path: FILE}]",),
    "both": ("warm_start.steps=2 has no effect with warm_start.epochs=1: set warm_start.epochs=null or",),
    "patience": ("warm_start.patience=1 needs a held-out loss: set warm_start.heldout",),
    "positions": ("warm_start.max_tokens=5000: the model has 2048 positions",),
    "over": ("the warm start is over and is not repeated",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(ran: Ran, name: str) -> None:
    assert ran.ended[name].code == 2, ran.ended[name].error
    assert all(part in ran.ended[name].said for part in REFUSED[name]), ran.ended[name].error
    assert name == "over" or not (ran.folder / name / "warm_start" / "checkpoints").exists()


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_sees_the_same_loss_and_gradient(ran: Ran, grid: str) -> None:
    """On conversations with untrained replies and answers of tools."""
    mixed = MIXED.replace("%s", str(ran.folder))
    code, _, error = icrl(*sft(ran.folder, grid, mixed, *WHOLE, "warm_start.steps=2", *GRIDS[grid]))
    assert code == 0, error
    for one, two in zip(ran.rows("whole")[:3], ran.rows(grid), strict=True):
        for name in ("sft/nll", "heldout/nll", "actor/grad_norm", "tokens/loss"):
            assert one.get(name, 0.0) == pytest.approx(two.get(name, 0.0), rel=1e-5), name


def test_the_report_shows_the_loss(ran: Ran) -> None:
    code, _, error = icrl("report", str(ran.folder / "whole"))
    assert code == 0, error
    page = (ran.folder / "whole/report.html").read_text(encoding="utf-8")
    (data,) = [line for line in page.splitlines() if 'id="data"' in line]
    found = json.loads(data.partition(">")[2].rpartition("</script>")[0])["groups"][0]["supervised"]
    assert found["held-out"]["x"] == [0, 2, 4, 6] and found["training"]["x"] == [1, 2, 3, 4, 5, 6]
