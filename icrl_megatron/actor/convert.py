"""`icrl import` and `icrl export`: between Hugging Face folders and checkpoints, in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icrl_megatron.actor import checkpoint, platform
from icrl_megatron.actor import grid as grids
from icrl_megatron.actor.actor import Actor
from icrl_megatron.actor.export import copy_side_files, write_hf
from icrl_megatron.actor.model import DTYPES
from icrl_megatron.actor.weights import Gatherer
from icrl_megatron.config import ActorSettings, ConfigError, Settings
from icrl_megatron.model_config import name_dtype, read_config
from icrl_megatron.shape import check_folder, locate_weights


def import_hf(source: Path, target: Path) -> None:
    """Writes `target`/step_000000: fp32 main weights, moments of zero. The checkpoint's config.json names the dtype
    that the weights are stored in, even if the folder's names another, so `export_hf` returns the same values.

    Raises ConfigError on a bad folder."""
    dtypes = {tensor.dtype for tensor in locate_weights(source, check_folder(source)).values()}
    precision = "bf16" if dtypes == {"BF16"} else "fp32"
    with tempfile.TemporaryDirectory() as temporary, _single_actor(source, precision) as (actor, grid):
        like = Path(temporary) / "model"
        copy_side_files(source, like)
        name_dtype(like / "config.json", str(DTYPES[precision]).removeprefix("torch."))
        start = checkpoint.Progress(step=0, weight_version=0, optimizer_steps=0, generated_tokens=0)
        checkpoint.save(target, actor.rows, actor.optimizer, grid, start, like)


def export_hf(source: Path, target: Path) -> None:
    """Writes the weights of a checkpoint (a step folder, or a folder of them: the newest) as a Hugging Face folder, in
    the dtype that its configuration names. Raises ConfigError if there is no complete checkpoint."""
    steps = [source] if (source / checkpoint.META).exists() else checkpoint.complete(source)
    if not steps:
        raise ConfigError(
            f"{source}: no complete checkpoint there; give a step_NNNNNN folder or the folder that has them"
        )
    like = steps[-1] / checkpoint.SIDE_FILES
    precision = "bf16" if _dtype(like) == "bfloat16" else "fp32"
    with _single_actor(like, precision, weights=False) as (actor, grid):
        checkpoint.load(steps[-1], actor.rows, actor.optimizer, grid)
        write_hf(Gatherer(actor.rows, grid), like, target, grid)


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
