"""`icrl ablate --on slurm`: the cells as an array, each a job with all that slurm/job.sh does, and the table last.

Submitted again, only cells that are not finished are queued; they go on from their checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from icrl_megatron.launch.ablate import START, AblationPlan, cell_words, finished, start_words
from icrl_megatron.run import checks as validate
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import write_atomically

SCRIPT = Path("slurm") / "ablate.sbatch"
SLURM_TIMEOUT_S = 60
"""Of one question to Slurm."""
START_CELL, TABLE_CELL = "start", "table"


@dataclass(frozen=True)
class Queue:
    """Where and how the jobs run; empty: Slurm's own default, or the script's."""

    account: str = ""
    partition: str = ""
    time: str = ""
    """Time limit of a cell."""
    at_once: int = 0
    """Cells that run at the same time; 0: as many as fit."""


@dataclass(frozen=True)
class ArrayJob:
    """One submission."""

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    """Names of the jobs that it waits for."""
    any_end: bool = False
    """Runs after these however they ended; else only after success."""


def save_plan(plan: AblationPlan) -> Path:
    """<out>/plans/<digest>.json, under a name of its own: queued jobs read it hours later."""
    text = json.dumps(asdict(plan) | {"out": str(plan.out)}, indent=1)
    path = plan.out / "plans" / f"{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}.json"
    write_atomically(path, [text])
    return path


def load_plan(path: Path) -> AblationPlan:
    """What `save_plan` wrote. Raises ConfigError on anything else."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(saved.pop(name)) for name in ("arms", "seeds", "overrides")}
        return AblationPlan(**{**saved, **lists, "out": Path(saved["out"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a plan of `icrl ablate --on slurm` ({error}); submit it again") from error


def words(plan: AblationPlan, cell: str) -> list[str]:
    """The command of one task of the array (a number), or of the shared start; empty where nothing is left to do."""
    if cell == START_CELL:
        return start_words(plan)
    arm, seed = plan.cells()[int(cell)]
    return [] if finished(plan.folder(arm, seed)) else cell_words(plan, arm, seed)


def jobs(plan: AblationPlan, plan_file: Path, queue: Queue) -> list[ArrayJob]:
    """The submissions of a plan in their order: the shared warm start where one is missing, the arm that sets the
    budget, all other cells, and the table. Empty where everything is finished."""
    missing = [i for i, (arm, seed) in enumerate(plan.cells()) if not finished(plan.folder(arm, seed))]
    if not missing:
        return []
    first = [i for i in missing if plan.cells()[i][0] == plan.budget_of]
    found: list[ArrayJob] = []
    if start_words(plan):
        found.append(_job(plan, plan_file, queue, START_CELL, (), ()))
    for name, cells in (("budget", first), ("cells", [i for i in missing if i not in first])):
        if cells:
            limit = f"%{queue.at_once}" if queue.at_once else ""
            array = f"--array={','.join(map(str, cells))}{limit}"
            found.append(_job(plan, plan_file, queue, name, (array,), tuple(j.name for j in found)))
    # The table takes minutes, whatever a cell may take.
    short = replace(queue, time="00:15:00")
    return [*found, _job(plan, plan_file, short, TABLE_CELL, (), tuple(j.name for j in found))]


def _job(
    plan: AblationPlan, plan_file: Path, queue: Queue, name: str, array: tuple[str, ...], after: tuple[str, ...]
) -> ArrayJob:
    launch = settings_module.load(plan.recipe, plan.overrides).launch
    given = [f"--{key}={value}" for key in ("account", "partition", "time") if (value := getattr(queue, key))]
    size = [f"--nodes={1 if name == TABLE_CELL else launch.nodes}", f"--gpus-per-node={launch.ranks}"]
    log = f"--output={plan.out}/jobs/{name}-{'%A_%a' if array else '%j'}.log"
    options = [*given, *size, f"--job-name={job_name(plan)}", log, *array]
    told = [str(plan_file)] if array else [str(plan_file), name]
    return ArrayJob(name, ("sbatch", "--parsable", *options, str(SCRIPT), *told), after, any_end=name == TABLE_CELL)


def job_name(plan: AblationPlan) -> str:
    """One name for all jobs of an ablation folder, by which they are found again."""
    return f"icrl-ablate-{hashlib.blake2b(str(plan.out).encode(), digest_size=4).hexdigest()}"


def check(plan: AblationPlan) -> None:
    """Raises ConfigError on what would end a cell at once: settings, model and folder of each arm, a missing script."""
    if not SCRIPT.exists():
        raise ConfigError(f"--on slurm: no {SCRIPT} here; run it in the folder of the checkout")
    # Before the shared start there is no model of the cells yet: the recipe's own stands for it.
    late = ("warm_start.steps=0", f"model.path={plan.out / START}/") if start_words(plan) else ()
    for arm in plan.arms:
        told = cell_words(replace(plan, budget_of=""), arm, plan.seeds[0])[2:]
        validate.validate(settings_module.load(plan.recipe, [word for word in told if not word.startswith(late)]))


def submit(plan: AblationPlan, queue: Queue) -> list[tuple[str, str]]:
    """Queues what is missing; (name, job id) of each submission.

    Raises ConfigError where Slurm refuses, with its words; what was queued by then is cancelled."""
    if shutil.which("sbatch") is None:
        raise ConfigError("--on slurm: no sbatch here; run it on a login node of the cluster")
    check(plan)
    waiting = _ask(["squeue", "--noheader", "--format=%i", f"--name={job_name(plan)}"]).split()
    if waiting:
        raise ConfigError(
            f"{plan.out}: jobs {', '.join(waiting)} of this ablation are still queued; wait for them, or "
            f"scancel --name={job_name(plan)}"
        )
    queued: dict[str, str] = {}
    with disk_errors(plan.out, "the logs of the jobs"):
        (plan.out / "jobs").mkdir(parents=True, exist_ok=True)
    for job in jobs(plan, save_plan(plan), queue):
        how = "afterany" if job.any_end else "afterok"
        after = [f"--dependency={how}:{':'.join(queued[name] for name in job.after)}"] if job.after else []
        try:
            # A job whose condition can no longer be met would wait for ever.
            options = [*after, "--kill-on-invalid-dep=yes"] if after else []
            queued[job.name] = _ask([*job.command[:2], *options, *job.command[2:]]).strip().split(";")[0]
        except ConfigError:
            if queued:
                _ask(["scancel", *queued.values()])
            raise
    return list(queued.items())


def _ask(command: Sequence[str]) -> str:
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
