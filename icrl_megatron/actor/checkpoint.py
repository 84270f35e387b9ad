"""Checkpoints that outlive crashes and change of grid.

A checkpoint holds, for every Hugging Face tensor, the fp32 main weight and both moments, written by
torch.distributed.checkpoint as rectangles of the whole tensor: any TP x PP x DP grid reads what it needs. A folder
appears under its final name only when it is complete, so a crash in the middle leaves the last good one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from icrl_megatron.actor.export import copy_side_files
from icrl_megatron.actor.grid import Grid
from icrl_megatron.actor.optimizer import STATES, Optimizer
from icrl_megatron.actor.weights import Row, Slice
from icrl_megatron.config import ConfigError
from icrl_megatron.telemetry.files import write_atomically

META = "icrl.json"
SIDE_FILES = "model"
_FOLDER = "step_{:06d}"


@dataclass(frozen=True)
class Progress:
    """Where a run is: everything besides tensors that the next step depends on. Random choices are functions of
    (seed, step), so they need no state of their own."""

    step: int
    """Training steps done."""
    weight_version: int
    optimizer_steps: int
    generated_tokens: int


class Rectangle:
    """A local tensor that is one rectangle of a named global one, as torch.distributed.checkpoint's planners see it."""

    def __init__(self, local: Tensor, part: Slice) -> None:
        self.local, self.part = local, part

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(self.part.offset), sizes=torch.Size(self.part.size))

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        data = TensorWriteData(chunk=self._chunk(), properties=properties, size=torch.Size(self.part.full))
        index = MetadataIndex(fqn, torch.Size(self.part.offset))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default walks the values and keeps only what it knows to be tensors.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator
        # A smaller tensor would fill its part of the rectangle and leave the rest as it came from the allocator.
        for name, target in state_dict.items():
            stored = metadata.state_dict_metadata.get(name) if metadata is not None else None
            if isinstance(stored, TensorStorageMetadata) and tuple(stored.size) != target.part.full:
                raise RuntimeError(f"{name} has shape {tuple(stored.size)}, the model's is {target.part.full}")

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


def save(
    root: Path,
    rows: list[Row],
    optimizer: Optimizer,
    grid: Grid,
    progress: Progress,
    like: Path,
    keep: int = 1,
    beside: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Writes `root/step_NNNNNN` and deletes all but the newest `keep`. Every rank takes part. Configuration and
    tokenizer of the Hugging Face folder `like` go with it, so that a checkpoint can be exported on its own. `beside`:
    further files of it by name, in lines.

    Optimizer shards are gathered over data-parallel ranks into host memory (12 bytes a parameter of this rank's TP x PP
    share, on the first replica); rectangles held by several ranks are written once.
    """
    final = root / _FOLDER.format(progress.step)
    part = root / (final.name + ".part")
    if grid.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier(group=grid.host_group)
    tensors = _gathered(rows, optimizer, grid)
    dcp.save(tensors, checkpoint_id=part, planner=_SavePlanner(), process_group=grid.host_group)
    if grid.rank == 0:
        copy_side_files(like, part / SIDE_FILES)
        for name, lines in (beside or {}).items():
            write_atomically(part / name, lines)
        (part / META).write_text(json.dumps(asdict(progress)))
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in complete(root)[:-keep]:
            shutil.rmtree(old)
    dist.barrier(group=grid.host_group)
    return final


def load(folder: Path, rows: list[Row], optimizer: Optimizer, grid: Grid) -> Progress:
    """Reads weights and optimizer state into this grid, whatever grid wrote them. Raises ConfigError if damaged."""
    progress = read_progress(folder)
    for row in rows:
        targets: dict[str, Any] = {}
        for name in STATES:
            for part in row.slices:
                targets[f"{name}/{part.name}"] = Rectangle(torch.empty(part.size), part)
        try:
            dcp.load(targets, checkpoint_id=folder, planner=_LoadPlanner(), no_dist=True)
        except (OSError, RuntimeError, KeyError, dcp.CheckpointException) as error:
            raise ConfigError(
                f"{folder}: damaged checkpoint ({error}); delete it to resume from the one before"
            ) from error
        states = {n: row.join([targets[f"{n}/{part.name}"].local for part in row.slices]) for n in STATES}
        optimizer.write(row.param, {n: t.to(row.param.device) for n, t in states.items()})
    optimizer.steps = progress.optimizer_steps
    dist.barrier(group=grid.host_group)
    return progress


def complete(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    found = [p for p in root.glob("step_*") if p.suffix != ".part" and (p / META).exists()]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def read_progress(folder: Path) -> Progress:
    """The progress record of a checkpoint. Raises ConfigError if there is none."""
    try:
        return Progress(**json.loads((folder / META).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder}: not a complete checkpoint ({error}); expected {META} in it") from error


def _gathered(rows: list[Row], optimizer: Optimizer, grid: Grid) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        for name, whole in optimizer.read(row.param):
            if row.duplicate or grid.data_rank != 0:
                continue
            for part, local in zip(row.slices, row.split(whole), strict=True):
                if part.size == part.full and grid.tensor_rank != 0:
                    continue
                found[f"{name}/{part.name}"] = Rectangle(local.to("cpu", copy=True).contiguous(), part)
    return found
