"""`icrl import` and `icrl export`: conversion between Hugging Face folders and checkpoints, in one process."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icrl_megatron.actor import checkpoint
from icrl_megatron.actor.actor import Actor
from icrl_megatron.actor.export import write_hf
from icrl_megatron.actor.side_files import read_side_files, write_side_files
from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed import platform
from icrl_megatron.distributed.platform import DTYPES
from icrl_megatron.model.config import name_dtype, read_config
from icrl_megatron.model.shape import check_folder, locate_weights
from icrl_megatron.model.weights import Gatherer
from icrl_megatron.settings.schema import ActorSettings, Settings
from icrl_megatron.utils import results
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError


def import_hf(source: Path, target: Path, overwrite: bool = False) -> None:
    """Writes `target`/step_000000 with fp32 main weights and zero moments. Other steps there are not touched. The
    checkpoint's config.json names the stored dtype of the weights, even if the folder's config.json names another, so
    that `export_hf` returns the same values.

    Raises ConfigError on a bad folder, and on a target that must not be written (`results.check_import`).
    """
    dtypes = {tensor.dtype for tensor in locate_weights(source, check_folder(source)).values()}
    precision = "bf16" if dtypes == {"BF16"} else "fp32"
    final = results.check_import(target, source, overwrite)
    with (
        tempfile.TemporaryDirectory() as temporary,
        _single_actor(source, precision) as (actor, grid),
        results.writing(final, results.CHECKPOINT, [source], overwrite) as folder,
        disk_errors(final, "the checkpoint"),
    ):
        like = Path(temporary)
        write_side_files(read_side_files(source), like)
        name_dtype(like / "config.json", str(DTYPES[precision]).removeprefix("torch."))
        start = checkpoint.SavedProgress(step=0, weight_version=0, optimizer_steps=0, generated_tokens=0)
        # `folder` is named like a step, inside a temporary folder; the checkpoint writer must create it.
        folder.rmdir()
        try:
            checkpoint.save(folder.parent, actor.rows, actor.optimizer, grid, start, like)
        except checkpoint.NonFiniteError as error:
            raise ConfigError(f"{source}: its weights are not all finite; import a model whose weights are") from error


def export_hf(source: Path, target: Path, overwrite: bool = False) -> None:
    """Writes the weights of a checkpoint (a step folder, or a folder of them: the newest good one) as a Hugging Face
    folder, in the dtype that its configuration names. Raises ConfigError if a named checkpoint is damaged, if there is
    no good one, and on a target that must not be replaced (`results.check`)."""
    results.check(target, results.MODEL, [source], overwrite)
    found = checkpoint.find(source, log=lambda message: print(message, file=sys.stderr))
    results.check(target, results.MODEL, [source, found.folder], overwrite)
    precision = "bf16" if _dtype(found.side_files) == "bfloat16" else "fp32"
    with _single_actor(found.side_files, precision, weights=False) as (actor, grid):
        found.load(actor.rows, actor.optimizer, grid)
        write_hf(Gatherer(actor.rows, grid), found.side_files, target, grid, overwrite)


@contextmanager
def _single_actor(folder: Path, precision: str, weights: bool = True) -> Iterator[tuple[Actor, grids.Grid]]:
    platform.prepare()
    grids.single_process()
    settings = Settings(actor=ActorSettings(precision=precision))
    grid = grids.build(settings)
    try:
        yield Actor(settings, folder, grid, weights=weights), grid
    finally:
        grids.shutdown()


def _dtype(folder: Path) -> str:
    config = read_config(folder / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")
