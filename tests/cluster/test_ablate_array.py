"""`icrl ablate --on slurm` on a real Slurm: the shared start, a job array with an interrupted cell, the table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from icrl_megatron.telemetry.writer import read_rows
from slurm import ACCOUNT, ENDED, PARTITION, Cluster, icrl, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(500)]

TIMEOUT_S = 300
STEPS = 30
SMALL = (
    f"steps={STEPS}",
    "rollout.tasks_per_step=2",
    "rollout.episodes_per_task=4",
    "eval.problems=4",
    "eval.interval=10",
    "eval.control_problems=0",
    "checkpoint.interval=10",
    "algo.on_no_signal=train",
    "algo.max_resamples=0",
    "warm_start.steps=2",
    "warm_start.episodes_per_step=8",
)
SLURM = ("--on", "slurm", "--account", ACCOUNT, "--partition", PARTITION, "--time", "00:20:00")


def command(out: Path, *more: str) -> list[str]:
    return [*icrl(), "ablate", "rulebook_easy", *SMALL, "--arms", "icrl,grpo", "--seeds", "0", "--out", str(out), *more]


def states(cluster: Cluster, job: str) -> list[str]:
    """States of all runs of a job or array task, including requeued ones."""
    asked = ("sacct", "-n", "-D", "-X", "-P", "-j", job, "-o", "State")
    return [line.split()[0] for line in cluster.run(*asked, timeout_s=20).stdout.splitlines() if line]


def logs(out: Path) -> str:
    return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')}" for p in sorted((out / "jobs").glob("*.log")))


def test_array_runs_all_cells_and_resumes_an_interrupted_one(cluster: Cluster) -> None:
    out = cluster.folder / "ablation"
    done = cluster.run(*command(out, *SLURM), timeout_s=120)
    assert done.returncode == 0, done.stderr
    queued = dict(re.findall(r"^(\w+) +job (\d+)$", done.stdout, re.M))
    assert list(queued) == ["start", "cells", "table"]

    again = cluster.run(*command(out, *SLURM), timeout_s=120)
    assert again.returncode == 2 and "still queued" in again.stderr

    metrics = out / "icrl_0" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, lambda: logs(out), TIMEOUT_S)
    # The signal that Slurm sends before the time limit. The other array task must not be affected.
    assert cluster.run("scancel", "--batch", "--signal=USR1", f"{queued['cells']}_0").returncode == 0
    until(lambda: states(cluster, queued["table"])[-1:] in [[s] for s in ENDED], lambda: logs(out), TIMEOUT_S)

    assert states(cluster, queued["table"]) == ["COMPLETED"], logs(out)
    runs = states(cluster, f"{queued['cells']}_0")
    assert len(runs) == 2 and runs[-1] == "COMPLETED", (runs, logs(out))
    assert states(cluster, f"{queued['cells']}_1") == ["COMPLETED"], logs(out)
    interrupted = (out / "jobs" / f"cells-{queued['cells']}_0.log").read_text()
    assert "stopped on request at" in interrupted and "resuming from" in interrupted
    for cell in ("icrl_0", "grpo_0"):
        assert [int(r["step"]) for r in read_rows(out / cell / "metrics.jsonl") if "tokens/generated" in r] == list(
            range(1, STEPS + 1)
        )
    rows = json.loads((out / "ablation.json").read_text())["arms"]
    assert [row["arm"] for row in rows] == ["icrl", "grpo"] and all(row["tokens"] > 0 for row in rows)
    assert "Held-out success" in (out / "jobs" / f"table-{queued['table']}.log").read_text()

    shown = cluster.run(*command(out, *SLURM), timeout_s=120)  # all cells are done
    assert shown.returncode == 0 and "job" not in shown.stdout and "grpo" in shown.stdout


def test_submission_rejected_by_slurm_queues_nothing(cluster: Cluster) -> None:
    out = cluster.folder / "refused"
    done = cluster.run(*command(out, *SLURM, "--account", "nobody"), timeout_s=120)
    assert done.returncode == 2 and "Invalid account" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert cluster.run("squeue", "--noheader", "--format=%j").stdout.count("icrl-ablate") == 0
