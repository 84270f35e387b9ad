"""The schema of all benchmark results, the report of them, and bench_e2e on a real run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from commands import python

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_report  # noqa: E402
import bench_schema  # noqa: E402


def result(**more: object) -> dict[str, object]:
    medians = {"icrl": {"train_s": 2.0, "rollout_s": 3.0, "step_s": 5.0, "tokens_per_s_a_gpu": 10.0}}
    report = bench_schema.about() | {"medians": medians, "recipe": "r", "gpus": 8} | more
    return bench_schema.stamped("e2e", report)


def test_every_result_has_the_common_keys(tmp_path: Path) -> None:
    path = tmp_path / "e2e.json"
    path.write_text(json.dumps(result()))
    read = bench_schema.read(path)
    assert set(bench_schema.REQUIRED) <= set(read)
    units = {row["quantity"]: row["unit"] for row in read["measurements"]}
    assert units == {"train_s": "s", "rollout_s": "s", "step_s": "s", "tokens_per_s_a_gpu": "1/s/GPU"}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}'])
def test_files_without_a_result_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json"):
        bench_schema.read(path)
    done = python(ROOT / "tools" / "bench_report.py", path, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_the_report_has_measured_and_predicted_values(tmp_path: Path) -> None:
    predicted = {"gpu": "h100", "train_s": 1.5, "rollout_s": 3.5, "step_s": 5.0, "tokens_per_s_a_gpu": 10.0}
    results = [result(predicted=predicted), result()]
    table = bench_report.rows(results)
    assert table[0][:6] == ("e2e r", "icrl", "train_s", "2", "1.5", "s")
    assert table[4][4] == ""
    assert bench_report.markdown(table).count("\n") == len(table) + 2
    assert bench_report.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not bench_report.plot(results[1:], tmp_path / "none.png")


def test_committed_results_follow_the_schema() -> None:
    for name in ("head_cpu.json", "step_cpu.json"):
        assert bench_schema.read(ROOT / "benchmarks" / name)["measurements"]


def test_a_real_run_is_measured(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "e2e.json"
    done = python(ROOT / "tools" / "bench_e2e.py", "rulebook_easy", "--run", finished_run, "--out", out)
    assert done.returncode == 0, done.stderr
    medians = bench_schema.read(out)["medians"]["icrl"]
    parts = ("rollout", "score", "train", "sync", "pack")
    assert medians["step_s"] == pytest.approx(sum(medians[f"{n}_s"] for n in parts))
    assert medians["tokens_per_s_a_gpu"] > 0
