"""Differences between two versions of a model's weights: `encode` in the trainer, `load_1` in an SGLang server.

The server imports this file, so it uses only torch and the standard library. SGLang calls a loader that it was started
with (`--custom-weight-loader icrl_deltas.load_1`; 0.5.23: model_runner_components/weight_updater.py) inside each of its
tensor-parallel workers. The bytes come over the process group that also carries whole weights.

The bits of a weight are one integer, and a difference is new minus old, modulo the size of the integer. Only those
that are not 0 are sent: their distances and their values, one byte each as a rule, deflated with Huffman codes. Names
and positions are those of the Hugging Face tensors. A worker holds slices of these, fused with others, and only
SGLang's loaders know which. So the worker gives them a whole tensor of differences, and while they run, `copy_` adds
instead of copying (`_Adding`).
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode

LOADER = "icrl_deltas.load_1"
"""What SGLang must be started with. The number is that of the format: another format gets another function."""
_WORDS = {2: torch.int16, 4: torch.int32}
_SKIP = 255
"""A distance of 255 weights without a difference; it is followed by the rest of the distance."""
_LARGE = -128
"""Instead of a difference that does not fit into a signed byte."""
_BATCH_BYTES = 256 << 20
"""Differences that a worker holds as whole tensors at one time, unless one tensor is larger."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeltaPiece:
    """The differences of one tensor. `sizes` are the bytes of the deflated distances, of the deflated differences, and
    of the differences that do not fit into a byte; or those of all differences, of a tensor that changed nearly
    everywhere; or nothing."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """The name of the torch dtype, such as "bfloat16"."""
    sizes: tuple[int, ...]


def encode(old: Tensor, new: Tensor) -> tuple[tuple[int, ...], bytes]:
    """The sizes of a DeltaPiece and its bytes, with which `decode` computes `_words(new) - _words(old)`. Both tensors
    have the same shape, device, and dtype of 2 or 4 bytes."""
    differences = _words(new) - _words(old)
    where = differences.nonzero().reshape(-1)
    if len(where) == 0:
        return (), b""
    if 2 * len(where) < differences.nbytes:
        values = differences[where]
        large = (values <= _LARGE) | (values > 127)
        small = values.masked_fill(large, _LARGE).to(torch.int8)
        parts = [_deflated(_distances(where)), _deflated(small), _bytes(values[large])]
        if sum(map(len, parts)) < differences.nbytes:
            return tuple(map(len, parts)), b"".join(parts)
    return (differences.nbytes,), _bytes(differences)


def decode(piece: DeltaPiece, data: bytes, device: torch.device) -> Tensor:
    """A tensor of the piece's shape and dtype whose bits are the differences. Raises ValueError unless the bytes are
    those of a piece of this shape."""
    dtype = getattr(torch, piece.dtype)
    count = torch.Size(piece.shape).numel()
    differences = torch.zeros(count, dtype=_WORDS[dtype.itemsize], device=device)
    if len(piece.sizes) == 1:
        differences = _tensor(data, differences.dtype, device)
    elif piece.sizes:
        first, second = piece.sizes[0], piece.sizes[0] + piece.sizes[1]
        small = _inflated(data[first:second], count, torch.int8, device)
        large, values = _tensor(data[second:], differences.dtype, device), small.to(differences.dtype)
        where = _places(_inflated(data[:first], 2 * count, torch.uint8, device))
        if len(where) != len(values) or (len(where) and int(where[-1]) >= count):
            raise ValueError(f"{piece.name!r}: {len(values)} differences at {len(where)} places of {count} weights")
        if int((small == _LARGE).sum()) != len(large):
            raise ValueError(f"{piece.name!r}: {len(large)} large differences instead of {(small == _LARGE).sum()}")
        values[small == _LARGE] = large
        differences[where] = values
    if len(differences) != count:
        raise ValueError(f"{piece.name!r}: {len(differences)} differences of {count} weights")
    return differences.view(dtype).view(piece.shape)


def load_1(model: Any, named: Sequence[tuple[str, Tensor]]) -> None:
    """SGLang calls this with the server's model. The name of each entry is a message (`message`); the tensor is empty.

    Raises nothing, because that would end the server: the trainer finds other checksums than it expects, and sends all
    weights.
    """
    for text, _ in named:
        try:
            _load(model, json.loads(text))
        except Exception:
            _log.exception("differences of weights could not be added; the trainer will send all weights")


def message(group: str, pieces: Sequence[DeltaPiece]) -> str:
    """Announces the bytes of the pieces, end to end, as the next broadcast over the process group of this name."""
    entries = [[p.name, p.shape, p.dtype, p.sizes] for p in pieces]
    return json.dumps({"group": group, "pieces": entries}, separators=(",", ":"))


@torch.no_grad()
def add(model: Any, pieces: Sequence[DeltaPiece], data: bytes) -> None:
    """Adds the differences to the parameters of a worker's model. `data` has the bytes of the pieces, end to end."""
    for batch in _batches(pieces, data, _device(model)):
        with _Adding():
            model.load_weights(batch)


def _load(model: Any, announced: dict[str, Any]) -> None:
    pieces = [DeltaPiece(name, tuple(shape), dtype, tuple(sizes)) for name, shape, dtype, sizes in announced["pieces"]]
    size = sum(sum(p.sizes) for p in pieces)
    if size:
        received = torch.empty(size, dtype=torch.uint8, device=_device(model))
        dist.broadcast(received, src=0, group=c10d._resolve_process_group(announced["group"]))
        add(model, pieces, _bytes(received))


def _device(model: Any) -> torch.device:
    found: torch.device = next(iter(model.parameters())).device
    return found


def _batches(pieces: Sequence[DeltaPiece], data: bytes, device: torch.device) -> Iterator[list[tuple[str, Tensor]]]:
    batch: list[tuple[str, Tensor]] = []
    held = start = 0
    for piece in pieces:
        if not piece.sizes:
            continue
        end = start + sum(piece.sizes)
        tensor, start = decode(piece, data[start:end], device), end
        if batch and held + tensor.nbytes > _BATCH_BYTES:
            yield batch
            batch, held = [], 0
        batch.append((piece.name, tensor))
        held += tensor.nbytes
    if batch:
        yield batch


class _Adding(TorchDispatchMode):
    """While this mode is active, `copy_` of a tensor of differences adds it to the target."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        to, differences = args[:2]
        if to.dtype != differences.dtype or to.shape != differences.shape:
            raise ValueError(f"differences of {differences.dtype} {tuple(differences.shape)} for {to.dtype} {to.shape}")
        words = _WORDS[to.dtype.itemsize]
        to.view(words).add_(differences.view(words))
        return to


def _words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(_WORDS[tensor.dtype.itemsize])


def _distances(where: Tensor) -> Tensor:
    """uint8: for each place, the weights between it and the one before, as 255s and a rest below 255."""
    between = where.diff(prepend=where.new_tensor([-1])) - 1
    ends = (between // _SKIP + 1).cumsum(0)
    distances = torch.full((int(ends[-1]),), _SKIP, dtype=torch.uint8, device=where.device)
    distances[ends - 1] = (between % _SKIP).to(torch.uint8)
    return distances


def _places(distances: Tensor) -> Tensor:
    """The inverse of `_distances`."""
    ends = distances != _SKIP
    return (distances.long() + ends).cumsum(0)[ends] - 1


def _bytes(tensor: Tensor) -> bytes:
    found: bytes = tensor.contiguous().cpu().numpy().tobytes()
    return found


def _tensor(data: bytes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Raises ValueError if the bytes are not a whole number of elements."""
    if not data:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device)


def _deflated(tensor: Tensor) -> bytes:
    """Huffman codes only: nothing repeats, and a search for repetitions would take most of the time."""
    packer = zlib.compressobj(level=1, wbits=-15, strategy=zlib.Z_HUFFMAN_ONLY)
    return packer.compress(_bytes(tensor)) + packer.flush()


def _inflated(data: bytes, longest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Raises ValueError if the bytes are not deflated, or hold more than `longest`."""
    unpacker = zlib.decompressobj(wbits=-15)
    try:
        found = unpacker.decompress(data, longest + 1)
    except zlib.error as error:
        raise ValueError(f"not deflated: {error}") from error
    if len(found) > longest or not unpacker.eof:
        raise ValueError(f"more than {longest} bytes")
    return _tensor(found, dtype, device)
