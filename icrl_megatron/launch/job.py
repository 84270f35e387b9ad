"""Checks and decisions of a batch job before it (slurm/job.sh) and between its runs (slurm/step.sh). No torch.

python -m icrl_megatron.launch.job check train RECIPE [KEY=VALUE]...    prints the run folder, or exits with 2
python -m icrl_megatron.launch.job check-for-image train RECIPE [KEY=VALUE]...    the same for a job in a container,
                                                                      whatever this Python has installed
python -m icrl_megatron.launch.job cell PLAN CELL    prints the words of an ablation's cell, one per line
python -m icrl_megatron.launch.job table PLAN    writes and prints an ablation's table
python -m icrl_megatron.launch.job said FILE    prints the error that ranks left there
python -m icrl_megatron.launch.job decide OUTCOME STATE RC STOP train RECIPE [KEY=VALUE]...
                                                                      prints: done | requeue | retry SECONDS | fail;
                                                                      RC, STOP: how the previous run ended
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from icrl_megatron.distributed import job_size
from icrl_megatron.distributed.process import CONFIG_ERROR, HOPELESS, STOPPED, read_outcome
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.step_names import step_name, steps_in
from icrl_megatron.utils.terminal import guard

MAX_CRASHES = 3
"""A job fails after more crashes than this, over all of its requeues."""
MAX_UNSAVED = 3
"""Consecutive stops without a new checkpoint after which a job fails."""
BACK_OFF_S = 30.0
"""Wait before the first retry; doubles with each retry."""


@dataclass(frozen=True)
class JobState:
    """State of a job across its steps and requeues."""

    crashes: int = 0
    crashed_at: str = ""
    """Progress at the last crash; a second crash at the same progress means that the step always crashes."""
    stopped_at: str = ""
    """Progress at the last stop on request."""
    unsaved: int = 0
    """Stops without saving since the newest checkpoint changed."""
    unsaved_at: str = ""
    """The newest checkpoints at the last of them."""


@dataclass(frozen=True)
class Decision:
    """The job's next action: done, requeue, retry or fail."""

    action: str
    state: JobState
    message: str = ""
    wait_s: float = 0.0


@dataclass(frozen=True)
class Reached:
    """Progress of a run, as texts that change whenever it advances."""

    at: str
    """The step of the last line of each of its metrics files."""
    saved: str
    """Its newest checkpoints, from which it resumes."""


def progress(run_folder: Path) -> Reached:
    """The progress of a run. Raises nothing: a missing part is "-"."""
    found, saved = [], []
    for folder in (run_folder / "warm_start", run_folder):
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []
        whole = [line for line in lines[-2:] if line.endswith("}")]
        found.append(str(json.loads(whole[-1]).get("step")) if whole else "-")
        root = folder / "checkpoints"
        complete = [name for name in map(step_name, steps_in(root)) if (root / name / "icrl.json").exists()]
        saved.append(complete[-1] if complete else "-")
    baselines = sorted(run_folder.glob("baseline_*"))
    of_baselines = [reached for path in baselines for reached in (path.name, progress(path).saved)]
    return Reached("/".join([*found, *(path.name for path in baselines)]), "/".join([*saved, *of_baselines]))


def decide(outcome: tuple[int, str] | None, returncode: int, stopping: bool, run: Reached, state: JobState) -> Decision:
    """The action after a step of `run` ended with `returncode` and wrote `outcome`.

    Success is done. A stop on request is requeued, unless the run has not advanced since the last one. A stop that
    could not save is requeued, unless it is the MAX_UNSAVED-th without a new checkpoint. A crash is retried after a
    wait that doubles, at most MAX_CRASHES times, but not if the previous crash was at the same progress.
    """
    at = run.at
    if outcome is not None and outcome[0] in (CONFIG_ERROR, HOPELESS):
        return Decision("fail", state, outcome[1])
    if outcome is not None and outcome[0] == STOPPED:
        if at == state.stopped_at:
            return Decision("fail", state, f"stopped twice at {at} without a step between: the time limit is too short")
        return Decision(
            "requeue", JobState(state.crashes, state.crashed_at, at), f"stopped on request at {at}, and saved"
        )
    if returncode == 0:
        return Decision("done", state)
    if stopping:
        return _killed_while_stopping(returncode, run, state)
    crashes = state.crashes + 1
    after = replace(state, crashes=crashes, crashed_at=at)
    if at == state.crashed_at:
        return Decision("fail", after, f"crashed twice at {at} (code {returncode}): the same step would crash again")
    if crashes > MAX_CRASHES:
        return Decision("fail", after, f"crashed {crashes} times, the last one at {at} (code {returncode})")
    wait = float(os.environ.get("ICRL_BACK_OFF_S", BACK_OFF_S)) * 2 ** (crashes - 1)
    said = f"crash {crashes} of at most {MAX_CRASHES}, at {at} (code {returncode}); retried in {wait:g} s"
    return Decision("retry", after, said, wait)


def _killed_while_stopping(returncode: int, run: Reached, state: JobState) -> Decision:
    unsaved = state.unsaved + 1 if run.saved == state.unsaved_at else 1
    after = replace(state, unsaved=unsaved, unsaved_at=run.saved)
    said = f"ended with {returncode} while stopping"
    if unsaved >= MAX_UNSAVED:
        why = f"{said}, {unsaved} times without a checkpoint after {run.saved}: the same steps would repeat forever"
        remedy = "give it more time between signal and end, or a smaller checkpoint.interval"
        return Decision("fail", after, f"{why}; {remedy}")
    return Decision("requeue", after, f"{said}; resumes from its last checkpoint")


def check(arguments: list[str], installed: bool = True) -> Path:
    """The run folder of `train|sft RECIPE [KEY=VALUE]...`.

    Raises ConfigError on all errors that can be found before the run, without those about installed packages if the run
    will use another Python; the number of ranks is ICRL_WORLD_SIZE, which the job sets to nodes x ranks per node."""
    from icrl_megatron.plan import planner
    from icrl_megatron.run import checks as validate
    from icrl_megatron.settings import loading as settings

    resolved = settings.load(arguments[1], arguments[2:])
    validate.validate(resolved, installed)
    planner.check(resolved)
    serving, machines = resolved.launch.engine_ranks, resolved.launch.nodes
    world, planned = job_size.ranks(resolved), planner.ranks(resolved) - serving * machines
    if world != planned:
        without = " without launch.engine_ranks" if serving else ""
        print(f"note: {arguments[1]} is for {planned} ranks (launch.ranks x launch.nodes{without}), this job has "
              f"{world}", file=sys.stderr)  # fmt: skip
    return settings.run_folder(resolved)


def _decide(run_folder: Path, outcome: Path, state_path: Path, returncode: int, stopping: bool) -> str:
    """Decides, saves the state, prints the reason to stderr, and returns the words for the shell."""
    state = JobState(**json.loads(state_path.read_text())) if state_path.exists() else JobState()
    decision = decide(read_outcome(outcome), returncode, stopping, progress(run_folder), state)
    write_atomically(state_path, [json.dumps(asdict(decision.state))], "the job's state")
    if decision.message:
        print(f"{'error: ' * (decision.action == 'fail')}{decision.message}", file=sys.stderr)
    return f"retry {decision.wait_s:g}" if decision.action == "retry" else decision.action


def _of_ablation(verb: str, plan_file: Path, cell: str = "") -> None:
    from icrl_megatron.launch import ablate
    from icrl_megatron.launch import ablate_array as ablate_slurm

    plan = ablate_slurm.load_plan(plan_file)
    if verb == "cell":
        print("\n".join(ablate_slurm.words(plan, cell)))
    else:
        ablate.conclude(plan)


def main(arguments: list[str]) -> None:
    """Entry point; a ConfigError is printed as one message, with exit code 2."""
    guard()
    try:
        verb, *rest = arguments
        if verb in ("check", "check-for-image"):
            print(check(rest, installed=verb == "check"))
        elif verb == "said":
            left = json.loads(Path(rest[0]).read_text(encoding="utf-8"))
            print(f"error: {left['message']}", file=sys.stderr)
        elif verb in ("cell", "table"):
            _of_ablation(verb, Path(rest[0]), *rest[1:])
        else:
            from icrl_megatron.settings import loading as settings

            run_folder = settings.run_folder(settings.load(rest[5], rest[6:]))
            print(_decide(run_folder, Path(rest[0]), Path(rest[1]), int(rest[2]), rest[3] == "1"))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(CONFIG_ERROR)


if __name__ == "__main__":
    main(sys.argv[1:])
