"""Evaluation during training: at its interval, with the newest weights, and excluded from training's counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import RECIPE, STEPS, batch, from_model, train

from icrl_megatron.settings.loading import load
from icrl_megatron.tasks import registry as task_sets
from icrl_megatron.telemetry.writer import METRICS_FILE, TIME_PREFIX, MetricsRow, read_rows

HELDOUT = "heldout/critique_free"


@pytest.fixture(scope="module")
def rows(finished_run: Path) -> list[MetricsRow]:
    return read_rows(finished_run / METRICS_FILE)


def test_evaluation_runs_at_its_interval_and_at_both_ends(rows: list[MetricsRow]) -> None:
    assert [row["step"] for row in rows if HELDOUT in row] == [0, 2, 4, STEPS]
    assert all((HELDOUT in row) == ("tokens/evaluation" in row) for row in rows)


def test_evaluation_tokens_and_time_are_counted_separately(rows: list[MetricsRow]) -> None:
    evaluated = [row for row in rows if HELDOUT in row]
    assert all(row["tokens/evaluation"] > 0 and row["time/evaluation_s"] > 0 for row in evaluated)
    generated = 0.0
    for row in rows:
        generated += row.get("tokens/generated", 0.0)
        assert row["tokens/generated_total"] == generated
        if "tokens/generated" in row:
            phases = [v for k, v in row.items() if k.startswith(TIME_PREFIX) and k.endswith("_s") and "_per_" not in k]
            training_s = sum(phases) - row.get("time/evaluation_s", 0.0)
            assert row["time/generated_tokens_per_s"] * training_s == pytest.approx(row["tokens/generated"], rel=1e-6)


def test_evaluation_uses_the_newest_weights(rows: list[MetricsRow], finished_run: Path, tmp_path: Path) -> None:
    """The last evaluation equals one of the exported model with the same seeds."""
    code = (
        "import sys; from pathlib import Path; from icrl_megatron.evaluation import play, run as evaluation\n"
        "from icrl_megatron.rollout.speakers import Seeds\n"
        "play.SEEDS = Seeds(run=0, step=0, purpose='heldout')\n"
        "evaluation.evaluate(evaluation.EvalRequest(Path(sys.argv[1]), problems=8, out=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(finished_run), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "eval.json").read_text())
    last = rows[-1]
    assert result["scores"][0]["average"]["mean"] == last[HELDOUT]
    assert result["generated_tokens"] == last["tokens/evaluation"]


def test_later_rounds_do_not_change_the_first(rows: list[MetricsRow], finished_run: Path, tmp_path: Path) -> None:
    start = [*from_model(finished_run), "steps=1"]
    commands = {
        "two_rounds": train(tmp_path / "two_rounds", *start, "eval.rounds=2"),
        "grpo": train(tmp_path / "grpo", *start, "eval.preset=paper", "eval.problems=null", "rollout.rounds=1"),
    }
    ended = batch(tmp_path, commands)
    assert [ended[name].error for name in commands if ended[name].code] == []
    two_rounds, grpo = (read_rows(tmp_path / name / METRICS_FILE) for name in commands)

    before = two_rounds[0]
    first = {name: value for name, value in rows[0].items() if name.startswith("heldout/")}
    assert first and first.items() <= before.items()  # the same model, problems and seeds
    failed = round(8 * (1 - before[HELDOUT]))
    assert failed > 0  # or no critique would be written
    assert before["heldout/wrong_to_right"] + before["heldout/stayed_wrong"] == failed
    assert before["heldout/by_round_1"] == before[HELDOUT] + before["heldout/wrong_to_right"] / 8
    assert before["heldout/critique_tokens"] >= 1
    assert before["tokens/evaluation"] > rows[0]["tokens/evaluation"]

    (source,) = load(RECIPE).tasks.sources
    everything = len(task_sets.of_source(source).problems("heldout"))
    assert everything > 8
    assert {row[f"heldout/attempts/{source.name}"] for row in grpo if HELDOUT in row} == {everything}
    assert all("heldout/by_round_1" in row for row in grpo if HELDOUT in row)
