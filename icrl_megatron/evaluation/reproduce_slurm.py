"""`icrl reproduce CELL... --on slurm`: each run as a job with all that slurm/job.sh does, then its evaluations."""

from __future__ import annotations

import os
from pathlib import Path

from icrl_megatron.evaluation.reproduce import CellPhase, Reproduction, check
from icrl_megatron.launch import slurm_queue
from icrl_megatron.launch.slurm_queue import Queue, SlurmJob
from icrl_megatron.settings import loading as settings_module

TRAIN, EVALUATE = Path("slurm") / "icrl_8b.sbatch", Path("slurm") / "eval.sbatch"


def jobs(asked: Reproduction, queue: Queue) -> list[SlurmJob]:
    """The submissions of what is not finished: each run, and its evaluations, which wait for it."""
    found = []
    for recipe, seed in asked.runs():
        training = asked.training(recipe, seed)
        launch = settings_module.load(recipe, asked.overrides).launch
        gpus = f"--gpus-per-node={launch.ranks}"
        after: tuple[str, ...] = ()
        if not training.done:
            size = (f"--nodes={launch.nodes}", gpus, f"--export=ALL,RECIPE={recipe}")
            found.append(_job(asked, queue, training, size, TRAIN, training.words[2:], ()))
            after = (training.name,)
        found += [
            _job(asked, queue, phase, ("--nodes=1", gpus), EVALUATE, phase.words[1:], after)
            for phase in asked.evaluations(recipe, seed)
            if not phase.done
        ]
    return found


def _job(
    asked: Reproduction,
    queue: Queue,
    phase: CellPhase,
    size: tuple[str, ...],
    script: Path,
    words: tuple[str, ...],
    after: tuple[str, ...],
) -> SlurmJob:
    name, log = f"--job-name={job_name(asked)}", f"--output={asked.out}/jobs/{phase.name}-%j.log"
    options = (*queue.options(), *size, name, log)
    return SlurmJob(phase.name, ("sbatch", "--parsable", *options, str(script), *words), after)


def job_name(asked: Reproduction) -> str:
    return slurm_queue.job_name("reproduce", asked.out)


def submit(asked: Reproduction, queue: Queue) -> list[tuple[str, str]]:
    """Queues what is missing; (name, job id) of each submission. Raises ConfigError on what would end a job at once,
    if jobs of this folder are still queued, and where Slurm refuses."""
    slurm_queue.require_slurm()
    for script in (TRAIN, EVALUATE):
        slurm_queue.require_script(script)
    check(asked, installed="ICRL_CONTAINER" not in os.environ)
    slurm_queue.require_none_queued(job_name(asked), asked.out)
    return slurm_queue.submit(jobs(asked, queue), asked.out)
