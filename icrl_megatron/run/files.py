"""The files of a run folder, and whether a run may write there. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from icrl_megatron.data.curriculum import HISTORY
from icrl_megatron.report.final import CURVE, REPORT
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.arms import BASELINE
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.dump_shards import ROLLOUTS_FOLDER
from icrl_megatron.telemetry.writer import METRICS_FILE, TENSORBOARD_FOLDER
from icrl_megatron.utils import results
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.step_names import step_of

WARM_START = "warm_start"
EXPORT = "hf"
CONTROL = "control_{}.json"
START = "start"
_WRITTEN = (METRICS_FILE, HISTORY, ROLLOUTS_FOLDER, TENSORBOARD_FOLDER, REPORT, CURVE, START)


def clear_start(folder: Path) -> None:
    """Removes an earlier or unfinished start from <run_dir>/start, and nothing else."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name == EXPORT or step_of(path.name.removesuffix(".part")) is not None:
            shutil.rmtree(path, ignore_errors=True)


def check(settings: Settings, folder: Path) -> None:
    """Raises ConfigError unless the run folder is new or belongs to the run that these settings resume: a run never
    replaces files that it did not write."""
    saved = folder / settings_module.SAVED_NAME
    names = (*_WRITTEN, *(CONTROL.format(when) for when in ("before", "after")))
    strangers = [name for name in names if (folder / name).exists()]
    if strangers and not saved.exists():
        raise ConfigError(
            f"run_dir={folder}: it holds {', '.join(strangers)} but no {settings_module.SAVED_NAME}, so it is not a "
            "run that can be resumed, and a new run would replace them; choose another run_dir"
        )
    sources = [Path(settings.model.path)] if settings.model.path else []
    for run in (folder, *([folder / BASELINE.format(settings.baseline)] if settings.baseline else [])):
        results.check(run / EXPORT, results.MODEL, sources, remedy=results.MOVE_AWAY)
        results.check(run / settings_module.KEPT_MODEL, results.MODEL_FILES, sources, remedy=results.MOVE_AWAY)
