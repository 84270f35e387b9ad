"""Differences between two versions of weights: their form, and how a server's worker adds them."""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from icrl_megatron.engines.on_server import icrl_deltas
from icrl_megatron.engines.on_server.icrl_deltas import DeltaPiece, decode, encode
from icrl_megatron.engines.sglang_deltas import DeltaRequest, requests

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench_deltas

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INTEGERS = {"bfloat16": torch.int16, "float16": torch.int16, "float32": torch.int32}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32)


def any_bits(dtype: str, count: int, seed: int) -> Tensor:
    """Any values of the dtype, among them NaNs, infinities and both zeros."""
    limits, generator = torch.iinfo(INTEGERS[dtype]), torch.Generator().manual_seed(seed)
    drawn = torch.randint(limits.min, limits.max + 1, (count,), generator=generator)
    return drawn.to(INTEGERS[dtype]).view(DTYPES[dtype])


def moved(old: Tensor, share: float, far: int, seed: int) -> Tensor:
    """The same bits, of which this share moved by up to `far`."""
    generator = torch.Generator().manual_seed(seed)
    by = torch.randint(-far, far + 1, old.shape, generator=generator).to(bits(old).dtype)
    return (bits(old) + by * (torch.rand(old.shape, generator=generator) < share)).view(old.dtype)


def added(old: Tensor, difference: Tensor) -> Tensor:
    return (bits(old) + bits(difference)).view(old.dtype)


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    rows=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.001, 0.01, 0.3, 1.0]),
    far=st.sampled_from([1, 127, 128, 30_000]),
    seed=st.integers(0, 2**31),
)
def test_old_bits_plus_difference_are_new_bits(dtype: str, rows: int, share: float, far: int, seed: int) -> None:
    old = any_bits(dtype, rows * 61, seed).view(rows, 61)
    new = moved(old, share, far, seed)
    sizes, data = encode(old, new)
    assert sum(sizes) == len(data) <= new.nbytes
    piece = DeltaPiece("w", (rows, 61), dtype, sizes)
    assert torch.equal(bits(added(old, decode(piece, data, CPU))), bits(new))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [(), (0,), (254,), (255,), (256,), (0, 255, 511), (999,), (509, 510, 765)])
def test_distances_around_255(dtype: str, places: tuple[int, ...]) -> None:
    old = any_bits(dtype, 1000, 1)
    new = old.clone()
    bits(new)[list(places)] += 1
    sizes, data = encode(old, new)
    assert len(sizes) == (3 if places else 0)
    assert torch.equal(bits(added(old, decode(DeltaPiece("w", (1000,), dtype, sizes), data, CPU))), bits(new))


def test_the_benchmark_compares_bits_and_bytes() -> None:
    """At the 8B recipe's learning rate, on a small model."""
    model = Namespace(hidden=64, layers=1, vocabulary=256, std=0.02, steps=2, recipe="qwen3_8b")
    found = bench_deltas.measure(model, bench_deltas.bound)
    assert all(0.01 < share < bench_deltas.TARGET for share in found["each"])
    assert found["across"] < sum(found["each"])


def test_weights_that_moved_by_one_step_in_a_hundred_take_a_hundredth() -> None:
    old = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    sizes, data = encode(old, moved(old, 0.015, 1, 0))  # one in three of these does not move
    assert len(sizes) == 3
    assert len(data) < 0.01 * old.nbytes


@settings(max_examples=200, deadline=None)
@given(flip=st.integers(0, 10**6), cut=st.integers(0, 400), dtype=st.sampled_from(sorted(DTYPES)))
def test_damaged_bytes_are_refused_or_have_the_shape(flip: int, cut: int, dtype: str) -> None:
    old = any_bits(dtype, 5000, 2)
    sizes, data = encode(old, moved(old, 0.02, 200, 2))
    damaged = bytearray(data[: len(data) - cut])
    if damaged:
        damaged[flip % len(damaged)] ^= 1 << flip % 8
    try:
        found = decode(DeltaPiece("w", (5000,), dtype, sizes), bytes(damaged), CPU)
    except ValueError:
        return
    assert found.shape == (5000,) and found.dtype == DTYPES[dtype]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((10,), "differences of 8 weights"), ((3, 3, 0), "not deflated|more than"), ((0, 0, 0), "more than")],
)
def test_pieces_of_another_shape_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(DeltaPiece("w", (8,), "bfloat16", sizes), bytes([255]) * sum(sizes), CPU)


def test_a_bomb_is_not_inflated() -> None:
    bomb = icrl_deltas._deflated(torch.full((10_000_000,), 255, dtype=torch.uint8))
    with pytest.raises(ValueError, match="more than 16 bytes"):
        decode(DeltaPiece("w", (8,), "bfloat16", (len(bomb), 2, 0)), bomb + b"\x03\x00", CPU)


SHAPES = {"q": (8, 6), "k": (4, 6), "v": (4, 6), "o": (6, 8), "norm": (6,), "vocabulary": (10, 6)}


class Worker(nn.Module):
    """A worker of two that holds weights as SGLang does: q, k and v fused and split by rows, o split by columns, the
    vocabulary padded. Its loaders copy slices."""

    def __init__(self, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {"qkv": (8, 6), "o": (6, 4), "norm": (6,), "vocabulary": (8, 6)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self.rank, self.begins = rank, {"q": 0, "k": 4, "v": 6}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name in self.begins:
                rows = tensor.shape[0] // 2
                mine = tensor.narrow(0, self.rank * rows, rows)
                parameters["qkv"].data.narrow(0, self.begins[name], rows).copy_(mine)
            elif name == "o":
                parameters[name].data.copy_(tensor.narrow(1, self.rank * 4, 4))
            elif name == "vocabulary":
                mine = tensor[self.rank * 8 : self.rank * 8 + 8]
                parameters[name].data[: len(mine)] = mine
                parameters[name].data[len(mine) :].fill_(0)
            else:
                parameters[name].data.copy_(tensor)


def pieces_of(old: dict[str, Tensor], new: dict[str, Tensor], dtype: str) -> tuple[list[DeltaPiece], bytes]:
    pieces, data = [], b""
    for name, tensor in new.items():
        sizes, added_bytes = encode(old[name], tensor)
        pieces.append(DeltaPiece(name, tuple(tensor.shape), dtype, sizes))
        data += added_bytes
    return pieces, data


@pytest.mark.parametrize(
    ("rank", "dtype", "batch"), [*itertools.product((0, 1), ("bfloat16", "float32"), (1, 1 << 20))]
)
def test_workers_with_fused_slices_end_with_the_bits_of_a_full_push(
    rank: int, dtype: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(icrl_deltas, "_BATCH_BYTES", batch)
    old = {name: any_bits(dtype, torch.Size(shape).numel(), 3).view(shape) for name, shape in SHAPES.items()}
    worker, whole = Worker(rank, DTYPES[dtype]), Worker(rank, DTYPES[dtype])
    worker.load_weights(old.items())
    for share in (0.02, 0.0, 1.0):
        new = {name: moved(tensor, share, 300, 4) for name, tensor in old.items()}
        icrl_deltas.add(worker, *pieces_of(old, new, dtype))
        old = new
    whole.load_weights(old.items())
    for (name, found), (_, expected) in zip(worker.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(bits(found), bits(expected)), name


def test_parameters_of_another_dtype_are_not_touched() -> None:
    old = {name: any_bits("bfloat16", torch.Size(shape).numel(), 3).view(shape) for name, shape in SHAPES.items()}
    worker = Worker(0, torch.float32)
    with pytest.raises(ValueError, match=r"differences of torch.bfloat16 \(4, 6\) for torch.float32"):
        icrl_deltas.add(worker, *pieces_of(old, {n: moved(t, 1.0, 1, 0) for n, t in old.items()}, "bfloat16"))
    assert all(parameter.count_nonzero() == 0 for parameter in worker.parameters())


def test_a_message_that_cannot_be_used_ends_no_server(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(0, torch.bfloat16)
    unknown = icrl_deltas.message("no_such_group", [DeltaPiece("q", (8, 6), "bfloat16", (2, 2, 0))])
    for text in ("not JSON", "{}", unknown):
        icrl_deltas.load_1(worker, [(text, torch.empty(0))])
    assert len(caplog.records) == 3
    assert "the trainer will send all weights" in caplog.text


@pytest.mark.parametrize(("limit", "expected"), [(10, ["ab", "c", "de"]), (99, ["abcde"])])
def test_requests_hold_up_to_the_limit_or_one_piece(limit: int, expected: list[str]) -> None:
    sizes = zip("abcde", (0, 4, 30, 3, 7), strict=True)
    each = [(DeltaPiece(name, (1,), "bfloat16", (size,)), bytes(size)) for name, size in sizes]
    found = list(requests(each, limit))
    assert ["".join(p.name for p in load.pieces) for load, _ in found] == expected
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert list(requests([], limit)) == [(DeltaRequest(), True)]
