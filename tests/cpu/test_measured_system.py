"""`icrl distill --heldout`: what a system achieves and costs, beside a model on the same questions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("bm25s")

from icrl_megatron.distill import command
from icrl_megatron.distill.timing import Timing, busy_seconds
from icrl_megatron.evaluation.result import EvalRequest, read_result
from icrl_megatron.evaluation.run import evaluate
from icrl_megatron.evaluation.system import measure
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import Settings, TinyModel
from icrl_megatron.utils.errors import ConfigError


def settings(*overrides: str) -> Settings:
    return load("archive", ["tasks.limit=20", "distill.attempts=2", *overrides])


def test_the_system_on_heldout_problems_against_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With runs of training problems in the same file, and a model that answers nothing."""
    out, small = tmp_path / "a.jsonl", settings("eval.problems=6", "tasks.limit=4")
    command.run(small, out)
    said = measure(small, out)
    system, costs = read_result(out.with_suffix(".eval.json"))
    runs = [json.loads(line) for line in out.with_suffix(".runs.jsonl").read_text().splitlines()[1:]]
    heldout = [run for run in runs if "/heldout/" in run["task_id"]]
    assert len(heldout) == 12 and len(runs) == 20 and len(system.successes) == 6
    for run in heldout:
        assert system.successes[run["task_id"]][run["attempt"]] == [run["correct"]]
    right = sum(run["correct"] for run in heldout)
    assert right > 0 and said.startswith(f"{100 * right / 12:.1f} % right, ")
    build_tiny(tmp_path / "model", TinyModel(hidden=32, heads=2, kv_heads=1, ffn=48, max_positions=512), ["so"], seed=1)
    lengths = ("rollout.context_tokens=400", "rollout.max_turn_tokens=4", "rollout.max_turns=1")
    short = ("rollout.templates=compact", *lengths)
    asked = EvalRequest(
        tmp_path / "model",
        ("archive",),
        samples=2,
        problems=6,
        against=out.with_suffix(".eval.json"),
        out=tmp_path / "eval",
        overrides=("launch.device=cpu", "rollout.templates=compact", *short),
    )
    assert evaluate(asked) == 0
    saved = json.loads((tmp_path / "eval" / "eval.json").read_text())
    (compared,) = saved["comparison"]
    assert (compared["pairs"], compared["only_first"], compared["only_second"]) == (12, 0, right)
    assert costs is not None and saved["costs_against"] == asdict(costs)
    assert costs.measures["answered"] == 1.0 and costs.measures["calls"] >= costs.measures["calls_search"] > 1
    assert costs.seconds is not None and 0 < costs.measures["seconds_searcher"] < costs.measures["seconds"]
    spans = [(run["timing"]["began"], run["timing"]["began"] + run["timing"]["seconds"]) for run in heldout]
    assert 0 < costs.seconds <= max(end for _, end in spans) - min(begin for begin, _ in spans)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"tokens read per attempt {saved['scores'][-1]['read_tokens']:.0f} {costs.read_tokens:.0f}" in shown
    assert f"time of all attempts together {saved['seconds']:.1f} s {costs.seconds:.1f} s" in shown


def test_times_that_were_not_measured_are_unknown(tmp_path: Path) -> None:
    """Files of runs and evaluations that an earlier version wrote."""
    out, small = tmp_path / "a.jsonl", settings("eval.problems=2", "distill.attempts=1")
    measure(small, out)
    runs = out.with_suffix(".runs.jsonl")
    head, first, second = runs.read_text().splitlines()
    old = {name: value for name, value in json.loads(first).items() if name != "timing"}
    runs.write_text("\n".join([head, json.dumps(old), second, ""]))
    measure(small, out)
    result = out.with_suffix(".eval.json")
    saved = json.loads(result.read_text())
    assert saved["seconds"] is None and not any("seconds" in name for name in saved["scores"][0]["measures"])
    for seconds in (None, 0.0):
        result.write_text(json.dumps({**saved, "seconds": seconds}))
        costs = read_result(result)[1]
        assert costs is not None and costs.seconds is None and costs.attempts == 2
    del saved["scores"], saved["seconds"]
    result.write_text(json.dumps(saved))
    assert read_result(result)[1] is None
    runs.write_text("\n".join([head, json.dumps({**old, "timing": {"began": 1, "seconds": -1, "agents": {}}}), ""]))
    with pytest.raises(ConfigError, match="line 2: not a run \\(timing is"):
        measure(small, out)


def test_pauses_and_attempts_at_one_time_count_once() -> None:
    spans = [(10.0, 5.0), (12.0, 1.0), (14.0, 3.0), (100.0, 1.0)]
    assert busy_seconds(Timing(began, seconds, {}) for began, seconds in spans) == 8.0
    assert busy_seconds([]) is None and busy_seconds([Timing(1.0, 1.0, {}), None]) is None
