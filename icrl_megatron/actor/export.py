"""Writes Hugging Face folders from the grid's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import save_file

from icrl_megatron.actor.side_files import read_side_files, write_side_files
from icrl_megatron.distributed.grid import Grid, gather_objects
from icrl_megatron.model.config import name_dtype
from icrl_megatron.model.weight_files import INDEX, SINGLE, shard_name
from icrl_megatron.model.weights import Gatherer
from icrl_megatron.utils import results
from icrl_megatron.utils.disk import disk_errors, require_space, size_text
from icrl_megatron.utils.errors import ConfigError

SHARD_BYTES = 4 << 30
"""Approximate size of the weight files, and so the maximum that rank 0 holds in addition to its own share."""


def write_hf(
    gatherer: Gatherer, like: Path, out: Path, grid: Grid, overwrite: bool = False, remedy: str = results.REMEDY
) -> None:
    """Writes the weights, in the parameters' dtype, with the configuration and tokenizer files of the folder `like`.

    Collective over all ranks; rank 0 writes, as `results.writing` does. Raises ConfigError, on all ranks, if `out` must
    not be replaced (`remedy` says what to do then) or the disk is full.
    """
    error: ConfigError | None = None
    stream = gatherer.stream()
    if grid.rank == 0:
        try:
            with results.writing(out, results.MODEL, [like], overwrite, remedy) as folder:
                _write(stream, _ShardWriter(folder, out, gatherer), like)
        except ConfigError as caught:
            error = caught
    for _ in stream:  # if rank 0 stopped early: gathering is collective
        pass
    said = gather_objects(grid, str(error) if error else "")[0]
    if said:
        raise error or ConfigError(said)


def _write(stream: Iterator[tuple[str, torch.Tensor]], writer: _ShardWriter, like: Path) -> None:
    with disk_errors(writer.out, "the model's configuration and tokenizer"):
        write_side_files(read_side_files(like), writer.folder)
    require_space(writer.out, writer.planned, "the Hugging Face export")
    for name, tensor in stream:
        writer.add(name, tensor)
    writer.close()


class _ShardWriter:
    """Collects tensors up to SHARD_BYTES and writes them; a single file without an index if all fit in one."""

    def __init__(self, folder: Path, out: Path, gatherer: Gatherer) -> None:
        """Writes into `folder`, which is later renamed to `out`."""
        self.folder, self.out = folder, out
        self.dtype = gatherer.owned[0][3]
        sizes = [torch.Size(full).numel() * dtype.itemsize for _, _, full, dtype in gatherer.owned]
        self.planned, self.count = sum(sizes), self._plan(sizes)
        self.held: dict[str, torch.Tensor] = {}
        self.bytes = self.total = 0
        self.where: dict[str, str] = {}
        self.files = 0

    @staticmethod
    def _plan(sizes: Sequence[int]) -> int:
        """The number of files, which must be known before the first is written because their names contain it."""
        files, held = 0, 0
        for size in sizes:
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
        """Writes the remaining tensors, the index if there are several files, and the dtype in the configuration."""
        self._flush()
        with self._errors():
            if self.count > 1:
                index = {"metadata": {"total_size": self.total}, "weight_map": self.where}
                (self.folder / INDEX).write_text(json.dumps(index, indent=2))
            name_dtype(self.folder / "config.json", str(self.dtype).removeprefix("torch."))

    def _flush(self) -> None:
        self.files += 1
        one = self.count == 1
        name = SINGLE if one else shard_name(self.files, self.count)
        with self._errors():
            save_file(self.held, self.folder / name, metadata={"format": "pt"})
        self.where.update(dict.fromkeys(self.held, name))
        self.held, self.bytes = {}, 0

    def _errors(self) -> AbstractContextManager[None]:
        return disk_errors(self.out, f"the Hugging Face export ({size_text(self.planned)})")
