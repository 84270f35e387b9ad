"""A checkpoint's tensors: each rank writes its rectangles into its own safetensors files, and reads the rectangles it
needs from the files of all ranks. `index.json` maps rectangles to files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from icrl_megatron.actor.manifest import FileRecord, reading, write_file
from icrl_megatron.model.weights import Slice
from icrl_megatron.utils.errors import ConfigError

INDEX = "index.json"
FILE_BYTES = 512 << 20
"""Maximum size of a file unless a single rectangle is larger, which bounds a rank's host memory."""
_WRITERS = 2
"""Files that a rank hashes and writes concurrently while the next one is gathered."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of the tensor `name`, and the file that has it under the same name."""

    name: str
    """State and Hugging Face name, e.g. exp_avg/model.norm.weight."""
    full: tuple[int, ...]
    """Shape of the whole tensor."""
    file: str
    offset: tuple[int, ...]
    size: tuple[int, ...]


@dataclass
class WrittenShards:
    """The pieces and files that one rank has written."""

    pieces: list[Piece] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)


class ShardWriter:
    """Collects rectangles and writes them to `folder` as rank_RRRRR_NNNN.safetensors."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._pool = ThreadPoolExecutor(_WRITERS)
        self._running: list[Future[None]] = []
        self._files = 0
        self._written = WrittenShards()

    def add(self, name: str, tensor: Tensor, part: Slice) -> None:
        """Copies `tensor` (float32, shape part.size, any device). Raises errors from writing earlier files."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > FILE_BYTES:
            self._flush()
        self._held[name] = tensor.to("cpu", copy=True).contiguous()
        self._bytes += size
        self._written.pieces.append(Piece(name, part.full, self._file, part.offset, part.size))

    def close(self) -> WrittenShards:
        """Waits until the files are written. Raises the first error."""
        try:
            if self._held:
                self._flush()
            for file in self._running:
                file.result()
        finally:
            self._pool.shutdown(cancel_futures=True)
        return self._written

    @property
    def _file(self) -> str:
        return f"rank_{self._rank:05d}_{self._files:04d}.safetensors"

    def _flush(self) -> None:
        if len(self._running) >= _WRITERS:
            self._running.pop(0).result()
        self._running.append(self._pool.submit(self._write, self._file, self._held))
        self._held, self._bytes, self._files = {}, 0, self._files + 1

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        self._written.files[name] = write_file(self._folder / name, save(tensors, metadata={"format": "pt"}))


def write_index(folder: Path, pieces: Iterable[Piece]) -> FileRecord:
    """Writes index.json: tensor name -> {"full": shape, "pieces": [[file, offset, size], ...]}. Raises OSError."""
    tensors: dict[str, Any] = {}
    for piece in pieces:
        entry = tensors.setdefault(piece.name, {"full": piece.full, "pieces": []})
        entry["pieces"].append([piece.file, piece.offset, piece.size])
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(tensors[name])}" for name in sorted(tensors))
    return write_file(folder / INDEX, f"{{\n{lines}\n}}\n".encode())


class ShardReader:
    """Reads rectangles of tensors, whatever grid wrote them. The files must have been verified."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        """`files`: the files in the checkpoint's record; no other file is opened. Raises ConfigError on an index of
        another version."""
        self._folder, self._listed = folder, set(files)
        self._open: dict[str, Any] = {}
        with reading(folder, INDEX):
            text = (folder / INDEX).read_bytes()
        try:
            self._full = {name: tuple(entry["full"]) for name, entry in json.loads(text).items()}
            self._pieces = {
                name: [Piece(name, self._full[name], file, tuple(o), tuple(s)) for file, o, s in entry["pieces"]]
                for name, entry in json.loads(text).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{folder / INDEX}: written by another version of this program ({error!r}); use that version"
            ) from error

    def read(self, name: str, part: Slice) -> Tensor:
        """The rectangle `part` of the tensor `name`, float32 on the CPU. Raises ConfigError if the checkpoint holds
        another model or cannot be read."""
        if name not in self._full:
            raise ConfigError(f"{self._folder}: has no {name}, so it is a checkpoint of another model")
        if self._full[name] != part.full:
            raise ConfigError(
                f"{self._folder}: holds another model: {name} has shape {self._full[name]}, the model's is {part.full}"
            )
        with reading(self._folder, name):
            out, found = torch.empty(part.size, dtype=torch.float32), 0
            for piece in self._pieces[name]:
                low = tuple(max(a, b) for a, b in zip(piece.offset, part.offset, strict=True))
                high = tuple(min(a, b) for a, b in zip(_ends(piece), _ends(part), strict=True))
                if all(a < b for a, b in zip(low, high, strict=True)):
                    out[_within(low, high, part.offset)] = self._tensor(piece)[_within(low, high, piece.offset)]
                    found += math.prod(b - a for a, b in zip(low, high, strict=True))
        if found != out.numel():
            raise ConfigError(f"{self._folder}: its {INDEX} does not list all of {name}; use another checkpoint")
        return out

    def _tensor(self, piece: Piece) -> Any:
        if piece.file not in self._listed:
            raise ConfigError(
                f"{self._folder}: its {INDEX} names {piece.file!r}, which is not a file of it; do not use it"
            )
        try:
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(self._folder / piece.file, framework="pt")
            return self._open[piece.file].get_slice(piece.name)
        except SafetensorError as error:
            raise ConfigError(f"{self._folder / piece.file}: cannot be read ({error})") from error


def _ends(part: Slice | Piece) -> tuple[int, ...]:
    return tuple(o + s for o, s in zip(part.offset, part.size, strict=True))


def _within(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
