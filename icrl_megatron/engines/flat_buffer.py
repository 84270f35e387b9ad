"""Tensors of several shapes and dtypes end to end in one buffer of bytes, so that they are sent together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGN = 16
"""Alignment of tensors in bytes; any dtype can be viewed at such an offset."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Placed:
    """Position of a tensor in a buffer, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


class FlatBuffer:
    """A buffer [bytes, uint8] and what is in it."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.placed: list[Placed] = []
        self.used = 0

    def start(self) -> int:
        """Offset of the next tensor."""
        return _aligned(self.used)

    def add(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        """Copies the tensor into the buffer, which must have room for it, converted to `dtype` if that is given."""
        dtype = dtype or tensor.dtype
        start = self.start()
        place = Placed(name, tuple(tensor.shape), dtype, start, start + tensor.numel() * dtype.itemsize)
        self._view(place).copy_(tensor)
        self.placed.append(place)
        self.used = place.end

    def clear(self) -> None:
        self.placed, self.used = [], 0

    def tensors(self, placed: Iterable[Placed]) -> Iterator[tuple[str, Tensor]]:
        """Views of the tensors at these places."""
        for place in placed:
            yield place.name, self._view(place)

    def _view(self, place: Placed) -> Tensor:
        return self.buffer[place.start : place.end].view(place.dtype).view(place.shape)


def sizes(shapes: Shapes, itemsize: int) -> tuple[int, int]:
    """Bytes of the largest tensor, and of all tensors end to end in one buffer."""
    each = [torch.Size(shape).numel() * itemsize for shape in shapes.values()]
    return max(each), sum(map(_aligned, each))


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
