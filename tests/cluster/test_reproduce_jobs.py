"""`icrl reproduce CELL --on slurm` on a real Slurm: the run, the evaluation that waits for it, the cell's number."""

from __future__ import annotations

import json
import re

import pytest
from paper_cells import LOCAL, SMALL, STEPS, write_data, write_model

from slurm import ACCOUNT, ENDED, PARTITION, ROOT, Cluster, icrl, rows, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(500)]

CELL = "math-icrl-8b-aime24"
SLURM = ("--on", "slurm", "--account", ACCOUNT, "--partition", PARTITION, "--time", "00:20:00")
TIMEOUT_S = 300


def test_a_cell_is_trained_evaluated_and_read(cluster: Cluster) -> None:
    here = cluster.folder / "reproduce"
    here.mkdir()
    write_data(here / "data")
    (here / "slurm").symlink_to(ROOT / "slurm")
    words = [*icrl(), "reproduce", CELL, *SMALL, *LOCAL, f"model.path={write_model(here / 'model')}", "--out", "out"]

    done = cluster.run(*words, *SLURM, timeout_s=120, cwd=here)
    assert done.returncode == 0, done.stderr
    jobs = [int(job) for job in re.findall(r"^job (\d+): ", done.stdout, re.M)]
    assert len(jobs) == 2, done.stdout
    again = cluster.run(*words, *SLURM, timeout_s=120, cwd=here)
    assert again.returncode == 2 and "still queued" in again.stderr

    def logs() -> str:
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')}" for p in sorted(here.glob("out/jobs/*.log")))

    until(lambda: cluster.accounted(jobs[1])[0] in ENDED, logs, TIMEOUT_S)
    assert [cluster.accounted(job)[0] for job in jobs] == ["COMPLETED", "COMPLETED"], logs()
    (metrics,) = here.glob("out/*/metrics.jsonl")
    assert [row["step"] for row in rows(metrics.parent) if "tokens/generated" in row] == list(range(1, STEPS + 1))

    (cell,) = json.loads(cluster.run(*words, "--list", "--json", cwd=here).stdout)
    assert cell["ours"] != "not run", cell
    finished = cluster.run(*words, *SLURM, timeout_s=120, cwd=here)
    assert finished.returncode == 0 and "job " not in finished.stdout.replace("jobs", ""), finished.stdout
