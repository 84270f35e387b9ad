"""Starts a run from another run's checkpoint (`start_from`): from its weights, and optionally its moments.

torchrun starts `python -m icrl_megatron.run.start SETTINGS.yaml` before training. It writes to <run_dir>/start

    step_NNNNNN/   the checkpoint: files are hard links or copies, so the original may be deleted then
    hf/            its weights in the run's precision, a Hugging Face folder: the model that training loads, and the
                   starting weights of engines, of a frozen critic and of the KL reference

Training then reads the fp32 weights and the moments from the checkpoint. Everything above `main` imports no torch.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from icrl_megatron.distributed.process import run_rank
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.run import files as run_files
from icrl_megatron.run.resume import EARLIER_FOLDER, earlier
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.loading import SAVED_NAME, load_saved, run_folder
from icrl_megatron.settings.schema import AlgoSettings, Settings
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.step_names import step_name, step_of, steps_in

FOLDER, MODEL = run_files.START, run_files.EXPORT
_SIDE_FILES = "model"
"""In a checkpoint: the model's configuration and tokenizer."""


def check(settings: Settings) -> None:
    """Raises ConfigError if `start_from` is not a checkpoint, or contradicts another setting."""
    given, folder = settings.start_from, run_folder(settings)
    if not given:
        if settings.start_with_moments:
            raise ConfigError("start_with_moments=true needs a checkpoint: give start_from, or leave it false")
        return
    own, there = folder.resolve(), Path(given).resolve()
    if there == own or there.is_relative_to(own / "checkpoints"):
        raise ConfigError(
            f"start_from={given} is in the run folder {folder} itself: leave start_from empty to resume that "
            "run, or choose another run_dir for a new one"
        )
    shape = ModelShape.read(configuration(settings))
    if settings.model.path and (Path(settings.model.path) / "config.json").exists():
        other = ModelShape.read(Path(settings.model.path))
        if other != shape:
            raise ConfigError(
                f"start_from={given} is a checkpoint of another model than model.path={settings.model.path} "
                f"({shape} and {other}): leave model.path empty, since a checkpoint contains its model's configuration"
            )
    for saved in _settings_of(source(given))[-1:] if settings.start_with_moments and not made(settings) else ():
        for name in ("beta1", "beta2"):
            was, now = getattr(saved.optim, name), getattr(settings.optim, name)
            if was != now:
                raise ConfigError(
                    f"start_with_moments=true loads averages with optim.{name}={was}, and the run has {now}: set "
                    f"optim.{name}={was}, or start_with_moments=false"
                )


def source(given: str) -> Path:
    """The checkpoint that `start_from` names: itself, or the newest of a folder of them or of a run.

    Raises ConfigError if there is none.
    """
    path = Path(given)
    if _is_checkpoint(path):
        return path
    for root in (path, path / "checkpoints"):
        if found := _checkpoints(root):
            return found[-1]
    if (path / "config.json").exists():
        raise ConfigError(
            f"start_from={given}: a Hugging Face folder, which is no checkpoint; give model.path={given} in place of "
            f"it, or import it first: icrl import {given} FOLDER"
        )
    raise ConfigError(
        f"start_from={given}: no checkpoint there; give a step_NNNNNN folder, the folder that has them, or a run folder"
    )


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is a complete checkpoint: a folder gets its name without a suffix when it is complete."""
    named = step_of(path.name) is not None or (path / "icrl.json").exists()
    return named and (path / _SIDE_FILES / "config.json").is_file()


def _checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; not those that were set aside."""
    return [path for path in (root / step_name(step) for step in steps_in(root)) if _is_checkpoint(path)]


def made(settings: Settings) -> bool:
    """Whether the run has everything that it needs from the checkpoint."""
    folder = run_folder(settings) / FOLDER
    return (folder / MODEL / "config.json").exists() and bool(_checkpoints(folder))


def configuration(settings: Settings) -> Path:
    """A folder with the model's configuration and tokenizer."""
    return _model(settings) if made(settings) else source(settings.start_from) / _SIDE_FILES


def training(settings: Settings) -> Settings:
    """The settings of the training program, once the start folder exists."""
    (copy,) = _checkpoints(run_folder(settings) / FOLDER)
    model = replace(settings.model, path=str(_model(settings)), init=None)
    return replace(settings, start_from=str(copy), model=model)


def lineage(settings: Settings) -> list[Settings]:
    """The settings of the run that the checkpoint comes from, oldest first, as far as they can be read: its training
    problems must not be held out now."""
    if not settings.start_from or made(settings):  # then this run's folder has them (`earlier`)
        return []
    return _settings_of(source(settings.start_from))


def _settings_of(checkpoint: Path) -> list[Settings]:
    folder = _run_of(checkpoint)
    with suppress(ConfigError):
        if folder is not None:
            return [*earlier(folder), load_saved(folder / SAVED_NAME)]
    return []


def _run_of(checkpoint: Path) -> Path | None:
    """The run folder that contains a checkpoint."""
    above = checkpoint.resolve().parents[:2]
    return next((folder for folder in above if (folder / SAVED_NAME).exists()), None)


def _model(settings: Settings) -> Path:
    return run_folder(settings) / FOLDER / MODEL


def main(settings: Settings) -> int:
    """Runs one rank of the program; returns 0. Any grid reads any grid's checkpoint."""
    from icrl_megatron.actor import checkpoint
    from icrl_megatron.actor.actor import Actor
    from icrl_megatron.actor.export import write_hf
    from icrl_megatron.model.weights import Gatherer
    from icrl_megatron.run.joining import joined

    with joined(settings) as grid:
        given, folder = source(settings.start_from), run_folder(settings) / FOLDER
        actor = Actor(replace(settings, algo=AlgoSettings()), given / checkpoint.SIDE_FILES, grid, weights=False)
        checkpoint.load(given, actor.rows, actor.optimizer, grid)
        if grid.rank == 0:
            _copy(given, folder)
            _keep_lineage(given, run_folder(settings))
        write_hf(Gatherer(actor.rows, grid), given / checkpoint.SIDE_FILES, folder / MODEL, grid)
    return 0


def _copy(given: Path, folder: Path) -> None:
    """Copies the checkpoint to folder/step_NNNNNN, completely or not at all."""
    name = given.name if step_of(given.name) is not None else step_name(0)
    part, final = folder / f"{name}.part", folder / name
    try:
        run_files.clear_start(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(given, part, copy_function=_link)
        part.rename(final)
    except OSError as error:
        raise ConfigError(
            f"{folder}: the checkpoint {given} cannot be copied there ({error.strerror or error}); choose a run_dir on "
            "a disk with room that you may write to"
        ) from error


def _link(given: str, target: str) -> None:
    try:
        os.link(os.path.realpath(given), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(given, target)


def _keep_lineage(given: Path, run_dir: Path) -> None:
    for number, saved in enumerate(_settings_of(given)):
        settings_module.save(saved, run_dir / EARLIER_FOLDER / f"start_{number:03d}.yaml")


if __name__ == "__main__":
    run_rank(lambda: main(load_saved(Path(sys.argv[1]))))
