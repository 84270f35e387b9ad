"""Hugging Face folders from the grid's weights, and checkpoints to and from them (`icrl import`, `icrl export`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from icrl_megatron.actor.grid import Grid
from icrl_megatron.actor.weights import Gatherer
from icrl_megatron.config import ConfigError
from icrl_megatron.model_config import name_dtype

SHARD_BYTES = 4 << 30
"""Weights are written in files of about this size: the most that rank 0 holds beside its own share."""
_KEPT = ("*.json", "*.jinja", "*.txt", "*.model")


def write_hf(gatherer: Gatherer, like: Path, out: Path, grid: Grid) -> None:
    """Writes the weights, in the parameters' dtype, beside the configuration and tokenizer files of the folder `like`.

    Every rank takes part; rank 0 writes. The folder appears under its name when it is complete.
    """
    part = out.with_name(out.name + ".part")
    writer = _ShardWriter(part, gatherer) if grid.rank == 0 else None
    if writer is not None:
        copy_side_files(like, part)
    for name, tensor in gatherer.stream():
        if writer is not None:
            writer.add(name, tensor)
    if writer is not None:
        writer.close()
        name_dtype(part / "config.json", str(next(iter(gatherer.owned))[3]).removeprefix("torch."))
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    dist.barrier(group=grid.host_group)


def copy_side_files(like: Path, part: Path) -> None:
    """Everything of a Hugging Face folder but its weights. Raises ConfigError if it has no config.json."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for pattern in _KEPT:
        for path in like.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copy2(path, part / path.name)
    if not (part / "config.json").exists():
        raise ConfigError(f"{like}: no config.json to export beside the weights; name the folder the model came from")


class _ShardWriter:
    """Collects tensors up to SHARD_BYTES and writes them; one file and no index where all fits in one."""

    def __init__(self, folder: Path, gatherer: Gatherer) -> None:
        self.folder = folder
        self.count = self._plan(gatherer)
        self.held: dict[str, torch.Tensor] = {}
        self.bytes = self.total = 0
        self.where: dict[str, str] = {}
        self.files = 0

    @staticmethod
    def _plan(gatherer: Gatherer) -> int:
        """How many files there will be: names carry the count, so it must be known before the first is written."""
        files, held = 0, 0
        for _, _, full, dtype in gatherer.owned:
            size = torch.Size(full).numel() * dtype.itemsize
            if held and held + size > SHARD_BYTES:
                files, held = files + 1, 0
            held += size
        return files + 1

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.bytes + size > SHARD_BYTES:
            self._flush()
        self.held[name] = tensor.to("cpu", copy=True)
        self.bytes += size
        self.total += size

    def close(self) -> None:
        self._flush()
        if self.count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": self.where}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        self.files += 1
        one = self.count == 1
        name = "model.safetensors" if one else f"model-{self.files:05d}-of-{self.count:05d}.safetensors"
        save_file(self.held, self.folder / name, metadata={"format": "pt"})
        self.where.update(dict.fromkeys(self.held, name))
        self.held, self.bytes = {}, 0
