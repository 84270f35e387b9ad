"""Batch jobs that depend on each other: how they are requested, submitted together, and found in Slurm's queue."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError

SLURM_TIMEOUT_S = 60
"""Time limit of one Slurm command."""


@dataclass(frozen=True)
class Queue:
    """Where and how the jobs run; empty: Slurm's own default, or the script's."""

    account: str = ""
    partition: str = ""
    time: str = ""
    """Time limit of a job."""
    at_once: int = 0
    """Tasks of an array that run at the same time; 0: as many as fit."""

    def options(self) -> list[str]:
        return [f"--{key}={value}" for key in ("account", "partition", "time") if (value := getattr(self, key))]


@dataclass(frozen=True)
class SlurmJob:
    """One submission."""

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    """Names of the jobs that it waits for."""
    any_end: bool = False
    """Runs after these however they ended; else only after success."""


def job_name(what: str, out: Path) -> str:
    """One name for all jobs of a folder, by which they are found again. `what`: "ablate", "reproduce"."""
    return f"icrl-{what}-{hashlib.blake2b(str(out).encode(), digest_size=4).hexdigest()}"


def require_slurm() -> None:
    """Raises ConfigError on a machine without Slurm."""
    if shutil.which("sbatch") is None:
        raise ConfigError("--on slurm: no sbatch here; run it on a login node of the cluster")


def require_script(script: Path) -> None:
    """Raises ConfigError outside of a checkout."""
    if not script.exists():
        raise ConfigError(f"--on slurm: no {script} here; run it in the folder of the checkout")


def require_none_queued(name: str, out: Path) -> None:
    """Raises ConfigError if jobs of this name, which write to `out`, have not ended."""
    waiting = ask(["squeue", "--noheader", "--format=%i", f"--name={name}"]).split()
    if waiting:
        raise ConfigError(
            f"{out}: jobs {', '.join(waiting)} of this folder are still queued; wait for them, or scancel --name={name}"
        )


def submit(jobs: Sequence[SlurmJob], out: Path) -> list[tuple[str, str]]:
    """Queues the jobs in their order, with logs in `out`/jobs; (name, job id) of each.

    Raises ConfigError where Slurm refuses, with its words; what was queued by then is cancelled."""
    queued: dict[str, str] = {}
    with disk_errors(out, "the logs of the jobs"):
        (out / "jobs").mkdir(parents=True, exist_ok=True)
    for job in jobs:
        how = "afterany" if job.any_end else "afterok"
        after = [f"--dependency={how}:{':'.join(queued[name] for name in job.after)}"] if job.after else []
        try:
            # Without this, a job whose condition can no longer be met would stay in the queue.
            options = [*after, "--kill-on-invalid-dep=yes"] if after else []
            queued[job.name] = ask([*job.command[:2], *options, *job.command[2:]]).strip().split(";")[0]
        except ConfigError:
            if queued:
                ask(["scancel", *queued.values()])
            raise
    return list(queued.items())


def ask(command: Sequence[str]) -> str:
    """Raises ConfigError with Slurm's own words."""
    # Jobs take the Python of this command unless they are told another, or run in an image that has its own.
    env = dict(os.environ) if "ICRL_CONTAINER" in os.environ else {"ICRL_PYTHON": sys.executable, **os.environ}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=SLURM_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{command[0]}: Slurm did not answer within {SLURM_TIMEOUT_S} s; is its controller up (`scontrol ping`)?"
        ) from error
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise ConfigError(
            f"{' '.join(command)}: {said}; `sinfo -o '%P %D %G'` lists partitions, "
            "`sacctmgr show assoc user=$USER` accounts"
        )
    return done.stdout
