"""`icrl ablate --on slurm`: the cells as an array, each a job with all that slurm/job.sh does, and the table last.

Submitted again, only cells that are not finished are queued; they go on from their checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from icrl_megatron.launch import slurm_queue
from icrl_megatron.launch.ablate import START, AblationPlan, cell_words, finished, start_words
from icrl_megatron.launch.slurm_queue import Queue, SlurmJob
from icrl_megatron.run import checks as validate
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import write_atomically

SCRIPT = Path("slurm") / "ablate.sbatch"
START_CELL, TABLE_CELL = "start", "table"


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


def jobs(plan: AblationPlan, plan_file: Path, queue: Queue) -> list[SlurmJob]:
    """The submissions of a plan in their order: the shared warm start where one is missing, the arm that sets the
    budget, all other cells, and the table. Empty where everything is finished."""
    missing = [i for i, (arm, seed) in enumerate(plan.cells()) if not finished(plan.folder(arm, seed))]
    if not missing:
        return []
    first = [i for i in missing if plan.cells()[i][0] == plan.budget_of]
    found: list[SlurmJob] = []
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
) -> SlurmJob:
    launch = settings_module.load(plan.recipe, plan.overrides).launch
    size = [f"--nodes={1 if name == TABLE_CELL else launch.nodes}", f"--gpus-per-node={launch.ranks}"]
    log = f"--output={plan.out}/jobs/{name}-{'%A_%a' if array else '%j'}.log"
    options = [*queue.options(), *size, f"--job-name={job_name(plan)}", log, *array]
    told = [str(plan_file)] if array else [str(plan_file), name]
    return SlurmJob(name, ("sbatch", "--parsable", *options, str(SCRIPT), *told), after, any_end=name == TABLE_CELL)


def job_name(plan: AblationPlan) -> str:
    """One name for all jobs of an ablation folder, by which they are found again."""
    return slurm_queue.job_name("ablate", plan.out)


def check(plan: AblationPlan) -> None:
    """Raises ConfigError on what would end a cell at once: settings, model and folder of each arm, a missing script."""
    slurm_queue.require_script(SCRIPT)
    # Before the shared start there is no model of the cells yet: the recipe's own stands for it.
    late = ("warm_start.steps=0", f"model.path={plan.out / START}/") if start_words(plan) else ()
    for arm in plan.arms:
        told = cell_words(replace(plan, budget_of=""), arm, plan.seeds[0])[2:]
        validate.validate(settings_module.load(plan.recipe, [word for word in told if not word.startswith(late)]))


def submit(plan: AblationPlan, queue: Queue) -> list[tuple[str, str]]:
    """Queues what is missing; (name, job id) of each submission.

    Raises ConfigError where Slurm refuses, with its words; what was queued by then is cancelled."""
    slurm_queue.require_slurm()
    check(plan)
    slurm_queue.require_none_queued(job_name(plan), plan.out)
    return slurm_queue.submit(jobs(plan, save_plan(plan), queue), plan.out)
