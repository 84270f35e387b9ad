"""`icrl launch` on the test Slurm, for tests with and without containers."""

from __future__ import annotations

import re
from pathlib import Path

from slurm import ACCOUNT, PARTITION, ROOT, TINY, Cluster, Done, icrl

RECIPE = "qwen3_8b_alfworld_4xh100"
SLURM = ("--on", "slurm", "--account", ACCOUNT, "--partition", PARTITION, "--time", "00:10:00")


class Nemo:
    """Runs `icrl launch`, status, logs and cancel in the Python interpreter with NeMo-Run."""

    def __init__(self, cluster: Cluster, python: str, home: Path) -> None:
        self.cluster, self.python, self.home = cluster, python, home

    def __call__(self, *arguments: str, timeout_s: float = 240, **more: str) -> Done:
        names = {"NEMORUN_HOME": str(self.home), "ICRL_HOME": str(ROOT), **more}
        return self.cluster.run(*icrl(self.python), *arguments, timeout_s=timeout_s, **names)

    def launch(self, *arguments: str, **more: str) -> Done:
        python = self.cluster.env["ICRL_PYTHON"]
        return self("launch", *arguments, "--python", python, "--ranks-per-node", "1", **more)


def arguments(folder: Path, model: Path, *more: str) -> list[str]:
    short = ["steps=1", "eval.problems=1", "launch.ranks=1", "actor.tensor_parallel=1", "actor.sequence_parallel=false"]
    return [RECIPE, f"run_dir={folder}", f"model.path={model}", *TINY, *short, *more]


def launched(done: Done) -> str:
    """The name of the experiment, from a launch's output."""
    return str(re.search(r"experiment (\S+): icrl status", done.stderr)[1])  # type: ignore[index]


def job_of(icrl_nemo: Nemo, experiment: str) -> int:
    """The Slurm job id of an experiment."""
    return int(re.search(r"job (\d+)", icrl_nemo("status", experiment).stdout)[1])  # type: ignore[index]


def failed_after_one_retry(icrl_nemo: Nemo, done: Done) -> str:
    """Checks a job whose rank 0 always fails at the same point (FAULTY); returns the output of all its runs.

    NeMo-Run would requeue it a hundred times, but the job step stops after the same crash occurred twice."""
    assert done.returncode == 1, done.stdout + done.stderr
    job = job_of(icrl_nemo, launched(done))
    ended = icrl_nemo.cluster.ended(job)
    assert (ended.state, ended.restarts) == ("FAILED", 2)
    said = "".join(path.read_text() for path in sorted(icrl_nemo.home.rglob(f"log-*_{job}_*.out")))
    assert said.count("RuntimeError: injected fault of rank 0") == 2
    assert "error: crashed twice at -/-" in said
    return said
