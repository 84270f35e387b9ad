"""The phases of `icrl train`: warm start, training, baseline, report. Imports no torch.

Each phase is a multi-rank program with its own folder. Finished phases are skipped, so the same command resumes
wherever it was stopped.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from icrl_megatron.distributed import job_size
from icrl_megatron.distributed.process import is_rank
from icrl_megatron.launch import servers as serve
from icrl_megatron.launch.torchrun import launch
from icrl_megatron.run import resume, start, teach_checks
from icrl_megatron.run.files import EXPORT, WARM_START
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.arms import ARMS, BASELINE, at_equal_cost
from icrl_megatron.settings.loading import run_folder
from icrl_megatron.settings.schema import ModelSettings, Settings
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import locked

_TRAIN = "icrl_megatron.train"
_JOB_LOCK = ".job.lock"


def run(settings: Settings) -> int:
    """Runs the phases that the settings select: start (a checkpoint of another run, or a warm start), training,
    baseline and report. Returns the process's exit code."""
    with _owned(settings) as owned:
        return _run(owned, run_folder(settings))


def warm_start(settings: Settings) -> int:
    """Runs only the supervised phase (`icrl sft`), which writes a Hugging Face folder to <run_dir>/warm_start/hf."""
    with _owned(settings) as owned:
        return _warm_start(owned)


@contextmanager
def _owned(settings: Settings) -> Iterator[Settings]:
    """Holds the lock of the run folder (of several ranks, only rank 0 does) before anything is written there, and
    prints which settings change in a resumed run. Yields the settings with the addresses of the run's environment
    servers, if any.

    Raises ConfigError for a multi-node run if this process is not a rank.
    """
    if settings.launch.nodes > 1 and not is_rank():
        raise ConfigError(
            f"launch.nodes={settings.launch.nodes}: this command starts ranks on one machine; use sbatch with slurm/ "
            "or `icrl launch RECIPE --on slurm`, or launch.nodes=1"
        )
    folder = run_folder(settings)
    with ExitStack() as held:
        if os.environ.get("RANK", "0") == "0":
            held.enter_context(locked(folder, _JOB_LOCK))
            for line in resume.adopt(settings, folder):
                print(line, file=sys.stderr)
        yield held.enter_context(serve.beside(settings, folder / "logs"))


def _run(settings: Settings, folder: Path) -> int:
    code = _start(settings, folder)
    code = code or _phase(_TRAIN, _training(settings, folder), folder)
    if code or settings.debug.mode != "train":
        return code
    if settings.baseline:
        baseline = _baseline(settings, folder)
        code = _phase(_TRAIN, baseline, run_folder(baseline))
    if code == 0 and os.environ.get("RANK", "0") == "0":
        from icrl_megatron.report.final import report

        report(settings)
    return code


def _warm_start(settings: Settings) -> int:
    folder = run_folder(settings) / WARM_START
    if (folder / EXPORT).exists():
        return 0
    teach_checks.check_teachable(settings)
    return _phase("icrl_megatron.sft", replace(settings, run_dir=str(folder)), folder)


def _start(settings: Settings, folder: Path) -> int:
    """Prepares the start of training: a checkpoint of another run, a warm start, or `model.path` unchanged."""
    if settings.start_from:
        return 0 if start.made(settings) else _phase("icrl_megatron.run.start", settings, folder)
    return _warm_start(settings) if _needs_warm_start(settings) else 0


def _needs_warm_start(settings: Settings) -> bool:
    return not settings.model.path or settings.warm_start.wanted


def _training(settings: Settings, folder: Path) -> Settings:
    if settings.start_from:
        return start.training(replace(settings, run_dir=str(folder)))
    path = str(folder / WARM_START / EXPORT) if _needs_warm_start(settings) else settings.model.path
    return replace(settings, run_dir=str(folder), model=ModelSettings(path=path))


def _baseline(settings: Settings, folder: Path) -> Settings:
    """The arm `settings.baseline` from the same start, with the same number of generated tokens."""
    from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows

    spent = int(read_rows(folder / METRICS_FILE)[-1]["tokens/generated_total"])
    same_start = replace(
        _training(settings, folder),
        name=f"{settings.name}_{settings.baseline}",
        run_dir=str(folder / BASELINE.format(settings.baseline)),
        eval=replace(settings.eval, control_problems=0),
    )
    changes = (*ARMS[settings.baseline].changes, *at_equal_cost(spent, 100 * settings.steps))
    return settings_module.apply_overrides(same_start, changes)


def _phase(module: str, settings: Settings, folder: Path) -> int:
    """Runs `module` on all ranks: starts them, or runs in this process if it is already a rank."""
    if is_rank():
        return int(importlib.import_module(module).main(settings))
    logs = folder / "logs"
    handed_over = logs / f"settings.{os.getpid()}.yaml"
    settings_module.save(settings, handed_over)
    try:
        ranks, rollout = job_size.training_of(settings, settings.launch.ranks), settings.rollout
        beside = module == _TRAIN and rollout.staleness > 0 and not rollout.interleave
        return launch(handed_over, ranks, logs, module=module, computing=2 if beside else 1)
    finally:
        with suppress(OSError):  # the disk may have become read-only
            handed_over.unlink()
