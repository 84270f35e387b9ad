"""Supervised training on files, by the real program: every format, held-out loss, early stop, resume and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import byte_model
import pytest
from trajectory_files import ROWS, alpaca, openai, rows_of, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_runs import Ended, batch, icrl, rows

FORMATS = (*ROWS, "oagents")
MIXED = "[{path: %s/openai.jsonl, weight: 2}, {path: %s/afm.jsonl, tool_format: tags}, {path: %s/oagents.jsonl}]"
WHOLE = ("warm_start.steps=6", "warm_start.heldout=0.25", "warm_start.heldout_interval=2", "warm_start.patience=3")


@dataclass(frozen=True)
class Ran:
    root: Path
    ended: dict[str, Ended]

    def rows(self, name: str) -> list[dict[str, float]]:
        return rows(self.root / name / "warm_start")

    def weights(self, name: str) -> bytes:
        return (self.root / name / "warm_start/hf/model.safetensors").read_bytes()


def sft(root: Path, name: str, data: str, *overrides: str) -> list[str]:
    """A run in root/name on the byte model."""
    fixed = [f"run_dir={root / name}", f"model.path={root / 'bytes'}", "model.init=null", "rollout.context_tokens=1024"]
    small = ["warm_start.episodes_per_step=4", "warm_start.warmup_steps=0", "launch.device=cpu", "warm_start.steps=2"]
    return ["sft", "rulebook_easy", *fixed, *small, f"warm_start.data={data.replace('%s', str(root))}", *overrides]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("sft")
    folder = byte_model.build(root / "bytes")
    tokenizer = AutoTokenizer.from_pretrained(folder)  # its template has no tools
    template = distribution("trl").locate_file("trl/chat_templates/qwen2_5.jinja")
    tokenizer.chat_template = Path(str(template)).read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    for name in FORMATS:
        write_jsonl(root / f"{name}.jsonl", rows_of(name, 12))
    (root / "list.json").write_text(json.dumps([alpaca(n) for n in range(12)]), encoding="utf-8")
    long = openai(99)
    long["messages"][-1]["content"] = "long " * 300
    write_jsonl(root / "rough.jsonl", [*(openai(n) for n in range(6)), {"messages": []}, long])
    write_jsonl(root / "other.jsonl", [openai(n) for n in range(50, 53)])
    mixed, of_one = MIXED.replace("%s", str(root)), "[{path: %s/openai.jsonl}]"
    rough, drop = "[{path: %s/rough.jsonl}]", "warm_start.bad_rows=drop"
    commands = {name: sft(root, name, f"[{{path: %s/{name}.jsonl}}]") for name in FORMATS if name != "afm"}
    commands |= {
        "afm": sft(root, "afm", "[{path: %s/afm.jsonl, tool_format: tags, format: afm}]"),
        "list": sft(root, "list", "[{path: %s/list.json}]", "warm_start.steps=0", "warm_start.epochs=1.5"),
        "whole": sft(root, "whole", mixed, *WHOLE),
        "broken": ["fault=sft@3", *sft(root, "broken", mixed, *WHOLE)],
        "resumed": sft(root, "broken", mixed, *WHOLE),
        "early": sft(
            root, "early", of_one, f"warm_start.heldout={root}/other.jsonl", "warm_start.heldout_interval=1",
            "warm_start.patience=2", "warm_start.steps=50", "warm_start.learning_rate=3",
        ),
        "dropped": sft(root, "dropped", rough, drop, "warm_start.too_long=drop"),
        "cut": sft(root, "cut", rough, drop, "warm_start.too_long=cut", "warm_start.max_tokens=950"),
        "bad": sft(root, "bad", rough),
        "long": sft(root, "long", rough, drop),
        "leak": sft(root, "leak", of_one, f"warm_start.heldout={root}/openai.jsonl"),
        "missing": sft(root, "missing", "[{path: %s/no.jsonl}]"),
        "share": sft(root, "share", of_one, "warm_start.heldout=1.5"),
        "no data": sft(root, "no", "[]", "warm_start.heldout=0.1"),
        "patience": sft(root, "no", of_one, "warm_start.patience=1"),
        "positions": sft(root, "no", of_one, "warm_start.max_tokens=5000"),
        "again": sft(root, "whole", mixed, *WHOLE, "warm_start.learning_rate=1"),
    }  # fmt: skip
    return Ran(root, batch(root, commands))


@pytest.mark.parametrize("name", [*FORMATS, "list"])
def test_every_format_is_trained_and_exported(ran: Ran, name: str) -> None:
    assert ran.ended[name].code == 0, ran.ended[name].error
    found = ran.rows(name)
    assert [row["step"] for row in found] == [1, 2] if name != "list" else [1, 2, 3, 4, 5]
    # Random weights are near the uniform distribution over 270 tokens, and the loss falls from there.
    assert abs(found[0]["sft/nll"] - math.log(270)) < 0.3 and all(row["data/dropped"] == 0 for row in found)
    folder = ran.root / name / "warm_start/hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) and ran.weights(name) != ran.weights("whole")


def test_held_out_loss_is_measured_before_while_and_after(ran: Ran) -> None:
    assert ran.ended["whole"].code == 0, ran.ended["whole"].error
    measured = [(row["step"], row["heldout/nll"]) for row in ran.rows("whole") if "heldout/nll" in row]
    assert [step for step, _ in measured] == [0, 2, 4, 6] and measured[-1][1] < measured[0][1]
    assert [row["step"] for row in ran.rows("whole")] == list(range(7))


def test_a_resumed_run_is_the_same_run(ran: Ran) -> None:
    assert ran.ended["broken"].code == 1 and ran.ended["resumed"].code == 0, ran.ended["resumed"].error
    assert "resuming from" in ran.ended["resumed"].error
    assert ran.rows("broken") == ran.rows("whole") and ran.weights("broken") == ran.weights("whole")


def test_training_ends_when_the_held_out_loss_stops_falling(ran: Ran) -> None:
    assert ran.ended["early"].code == 0, ran.ended["early"].error
    losses = [row["heldout/nll"] for row in ran.rows("early")]
    assert 3 <= len(losses) < 50 and (ran.root / "early/warm_start/hf/config.json").exists()
    assert min(losses[-2:]) >= min(losses[:-2])
    assert all(min(losses[: n - 1]) > min(losses[n - 1 : n + 1]) for n in range(2, len(losses) - 1))


def test_rows_are_dropped_and_counted_or_cut(ran: Ran) -> None:
    for name, dropped in (("dropped", 2), ("cut", 1)):
        assert ran.ended[name].code == 0, ran.ended[name].error
        assert [row["data/dropped"] for row in ran.rows(name)] == [dropped] * 2
    assert "1 of 8 rows cannot be trained on" in " ".join(ran.ended["dropped"].error.split())


REFUSED = {
    "bad": ("rough.jsonl, line 7: `messages` is '[]', not a list of messages", "set warm_start.bad_rows=drop"),
    "long": ("rough.jsonl, line 8 with", "Raise rollout.context_tokens (the model has 1024 positions), or set"),
    "leak": ("this held-out problem is trained on too", "openai.jsonl, line 1"),
    "missing": ("no.jsonl: no such file", ".jsonl, .json, .parquet, .arrow"),
    "share": ("warm_start.heldout=1.5: give a fraction between 0 and 1, or a file",),
    "no data": ("warm_start.heldout=0.1 needs conversations: set warm_start.data=[{path: FILE}]",),
    "patience": ("warm_start.patience=1 needs a held-out loss: set warm_start.heldout",),
    "positions": ("warm_start.max_tokens=5000: the model has 1024 positions",),
    "again": ("the warm start is over and is not repeated",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(ran: Ran, name: str) -> None:
    assert ran.ended[name].code == 2, ran.ended[name].error
    assert all(said in " ".join(ran.ended[name].error.split()) for said in REFUSED[name]), ran.ended[name].error
    assert name == "again" or not (ran.root / name / "warm_start" / "checkpoints").exists()


def test_two_ranks_see_the_same_loss_and_gradient(ran: Ran) -> None:
    mixed = MIXED.replace("%s", str(ran.root))
    code, _, error = icrl(*sft(ran.root, "two", mixed, *WHOLE, "warm_start.steps=1", "launch.ranks=2"))
    assert code == 0, error
    for one, two in zip(ran.rows("whole")[:2], ran.rows("two"), strict=True):
        for name in ("sft/nll", "heldout/nll", "actor/grad_norm"):
            assert one.get(name, 0.0) == pytest.approx(two.get(name, 0.0) if name in one else 0.0, rel=1e-5)


def test_the_report_shows_the_loss(ran: Ran) -> None:
    code, _, error = icrl("report", str(ran.root / "whole"))
    assert code == 0, error
    page = (ran.root / "whole/report.html").read_text(encoding="utf-8")
    (data,) = [line for line in page.splitlines() if 'id="data"' in line]
    found = json.loads(data.partition(">")[2].rpartition("</script>")[0])["groups"][0]["supervised"]
    assert found["held-out"]["x"] == [0, 2, 4, 6] and found["training"]["x"] == [1, 2, 3, 4, 5, 6]
