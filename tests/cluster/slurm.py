"""Submits jobs to the test Slurm that `conftest.py` starts, waits for them and checks how they ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from whole_runs import rows

Done = subprocess.CompletedProcess[str]
ROOT = Path(__file__).resolve().parents[2]
ACCOUNT, PARTITION, URGENT = "icrl", "batch", "urgent"
FAULTY = ROOT / "tests" / "cluster" / "faulty"
JOB_TIMEOUT_S = 200
STEPS = 4
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
TINY = (
    "tasks.sources=[{name: rulebook_easy}]",
    "engine.kind=local",
    "engine.tensor_parallel=1",
    "rollout.tasks_per_step=2",
    "rollout.episodes_per_task=4",
    "rollout.max_turn_tokens=24",
    "rollout.max_critique_tokens=24",
    "rollout.context_tokens=512",
    "rollout.templates=compact",
    "actor.precision=fp32",
    "actor.recompute=none",
    "actor.micro_batch_tokens=8192",
    "algo.on_no_signal=train",
    "algo.entropy_coef=0.01",
    "optim.learning_rate=1e-3",
    "algo.max_resamples=0",
    "eval.problems=4",
    "eval.control_problems=0",
    "checkpoint.interval=2",
    "launch.device=cpu",
)
"""Overrides that reduce the recipe to a size that two cores can run."""
SERVER = ROOT / "tests" / "agentgym_server.py"
AGENTGYM = (
    "tasks.sources=[{name: alfworld, data: {train: ['0:4'], heldout: ['4:8']}}]",
    f"tasks.sources.0.serve.command={sys.executable} {SERVER} alfworld {{port}} {{host}}",
    "rollout.max_turns=2",
)
"""A task whose environment server is started by the job."""


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    state: str
    code: str
    restarts: int
    log: str


@dataclass(frozen=True)
class Cluster:
    """The Slurm cluster of this test session."""

    env: Mapping[str, str]
    folder: Path

    def run(self, *command: str, timeout_s: float = 60, cwd: Path = ROOT, **more: str) -> Done:
        """Runs a command with the cluster's environment, by default in the repository's root."""
        env = {**self.env, **more}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=timeout_s)

    def sbatch(self, file: str, *arguments: str, options: tuple[str, ...] = (), cwd: Path = ROOT, **more: str) -> int:
        """Submits slurm/FILE from the folder `cwd`, on 2 nodes with one rank each; returns the job id."""
        command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1"]
        command += [f"--output={self.folder}/%j.log", *options, os.path.relpath(ROOT / "slurm" / file, cwd), *arguments]
        done = self.run(*command, cwd=cwd, **more)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.strip().split(";")[0])

    def checked(self, file: str, options: Sequence[str], arguments: Sequence[str], **more: str) -> Done:
        """Runs the same command with bash instead of sbatch, which only checks it."""
        here = [f"--account={ACCOUNT}", "--nodes=2", "--gpus-per-node=1", *options]
        return self.run("bash", f"slurm/{file}", *here, *arguments, **more)

    @property
    def local(self) -> Path:
        """A folder that each node has its own copy of (up.sh)."""
        return self.folder.parent / "local"

    @property
    def logs(self) -> Path:
        return Path(self.env["ICRL_LOGS"])

    def path(self, first: Path) -> str:
        """PYTHONPATH with `first` in front."""
        return os.pathsep.join((str(first), self.env["PYTHONPATH"]))

    def log(self, job: int) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def accounted(self, job: int) -> tuple[str, str, int]:
        """(state, exit code, restarts) of the newest run of a job; the state is empty before the first run."""
        asked = ("sacct", "-n", "-D", "-X", "-P", "-j", str(job), "-o", "State,ExitCode")
        runs = self.run(*asked, timeout_s=20).stdout.split("\n")[:-1]
        if not runs:
            return "", "", 0
        state, code = runs[-1].split("|")
        return state.split()[0], code, len(runs) - 1

    def ended(self, job: int, timeout_s: float = JOB_TIMEOUT_S) -> Ended:
        """Polls until the job has ended; `sbatch --wait` would take much longer."""
        until(lambda: self.accounted(job)[0] in ENDED, lambda: self.log(job), timeout_s)
        return Ended(*self.accounted(job), self.log(job))


def until(happened: Callable[[], bool], show: Callable[[], str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s:\n{show()[-4000:]}")
        time.sleep(0.3)


def arguments(folder: Path, model: Path, *more: str) -> list[str]:
    return [f"run_dir={folder}", f"model.path={model}", f"steps={STEPS}", *TINY, *more]


def evaluation(run: Path, cluster: Cluster) -> list[str]:
    """The arguments of an `icrl eval` that writes to `eval` in the cluster's folder."""
    sizes = ["--problems", "3", "--samples", "2", "launch.device=cpu"]
    return [str(run), *sizes, "--out", str(cluster.folder / "eval")]


def await_lines(folder: Path, count: int, cluster: Cluster, job: int) -> None:
    """Waits until metrics.jsonl has `count` lines."""
    metrics = folder / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= count, lambda: cluster.log(job), 150)


def stopped_in_the_middle(cluster: Cluster, job: int, folder: Path) -> Ended:
    """Stops a job like Slurm does before its time limit; it must save, be requeued, resume and complete."""
    await_lines(folder, 2, cluster, job)
    # The same signal that Slurm sends before the time limit (--signal=B:USR1@120).
    assert cluster.run("scancel", "--batch", "--signal=USR1", str(job)).returncode == 0
    return resumed(cluster, job, folder)


def preempt(cluster: Cluster, job: int, folder: Path) -> None:
    """Submits an urgent job that preempts a running job."""
    await_lines(folder, 1, cluster, job)
    command = ("sbatch", "--parsable", f"--account={ACCOUNT}", f"--partition={URGENT}", "--nodes=4", "--exclusive")
    done = cluster.run(*command, f"--output={cluster.folder}/%j.log", "--wrap", "sleep 1")
    assert done.returncode == 0, done.stderr
    assert cluster.ended(int(done.stdout)).state == "COMPLETED"


def resumed(cluster: Cluster, job: int, folder: Path) -> Ended:
    """Waits for a job that was stopped once: it must have saved before its last step, been requeued and resumed."""
    ended = cluster.ended(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), ended.log
    assert ended.log.count("stopped on request at") == 1
    assert "resuming from" in ended.log
    stopped_at = int(re.search(r"stopped on request at -/(\d+)", ended.log)[1])  # type: ignore[index]
    assert stopped_at < rows(folder)[-1]["step"]
    return ended


def icrl(python: str = sys.executable) -> list[str]:
    return [python, "-c", "from icrl_megatron.cli import main; main()"]


def job_environment() -> dict[str, str]:
    """The environment of jobs: this repository's code, this interpreter, one rank per node with one thread."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
    env = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("SLURM_")}
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "recipes"))
    ours = {"PYTHONPATH": path, "ICRL_PYTHON": sys.executable, "ICRL_RANKS_PER_NODE": "1", "ICRL_BACK_OFF_S": "0.5"}
    ours["ICRL_SEEN_TIMEOUT_S"] = "2"
    return env | ours | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
