"""Both heads on 1, 2 and 4 real gloo ranks equal the eager head in float64 in one process.

This file is also the program of a rank; its arguments are rank, rendezvous file and output folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from head_cases import needs_triton
from ranks import run_ranks
from torch import Tensor

from icrl_kernels import (
    Chunking,
    Streams,
    Terms,
    VocabShard,
    logprob_head,
    policy_head,
    reference_head,
    reference_scores,
    score_head,
    token_objective,
)

WORLD = 4
Key = tuple[int, str]
"""Degree of tensor parallelism and backend."""
WIDTH = 16
TERMS = Terms(temperature=0.8, kl_coef=0.05, entropy_coef=0.02)
Case = tuple[Tensor, Tensor, Streams, Terms]
Result = dict[str, Tensor]
GATHERS: list[torch.Size] = []
"""Shapes that this rank has all-gathered, in order."""
BACKENDS = ["torch"] + ["triton"] * (importlib.util.find_spec("triton") is not None)


SMALL_CHUNKS = {
    "torch_chunks": {"CHUNK_ELEMENTS": 96},
    "triton_chunks": {"CHUNK_BYTES": 384, "CHUNK_ALIGN": 1, "ROW_ALIGN": 2},
}
"""Chunks of six tokens if a rank has 16 columns, for cases that let the head choose the chunk size."""


def cases() -> dict[str, tuple[Case, int]]:
    """Name -> inputs for the whole vocabulary, and the number of rows that its weight is padded to. In cases named
    `uncut`, the head chooses the chunk size."""
    edges = build(vocabulary=64, tokens=23, terms=TERMS)
    edges[2].targets_L[:8] = torch.tensor([0, 15, 16, 31, 32, 47, 48, 63])
    low = on_policy(build(vocabulary=60, tokens=9, terms=Terms()))
    low[0][:, 0], low[1][:, 0] = 1.0, -160.0
    far = on_policy(build(vocabulary=64, tokens=8, terms=Terms(temperature=0.8, entropy_coef=0.02)))
    far[1][:16, 0], far[1][16:, 0], far[0][:, 0] = -400.0, 400.0, 1.0
    far[2].targets_L[:] = torch.arange(8)  # on a shard whose logits are 1000 below those of the others
    none = build(vocabulary=64, tokens=0, terms=TERMS)
    silent = build(vocabulary=64, tokens=7, terms=TERMS)
    silent[2].coefficients_L[:] = 0
    return {
        "edges": (edges, 64),
        "padded": (build(vocabulary=50, tokens=23, terms=TERMS), 64),
        "uncut": (build(vocabulary=50, tokens=23, terms=TERMS), 64),
        "uncut_empty_shards": (build(vocabulary=14, tokens=11, terms=TERMS), 64),
        "empty_shards": (build(vocabulary=14, tokens=11, terms=TERMS), 64),
        "below_120": (low, 64),
        "far_apart": (far, 64),
        "no_tokens": (none, 64),
        "silent": (silent, 64),
    }


def on_policy(case: Case) -> Case:
    """The case without old log-probs, for cases that then change hidden states or weight."""
    streams = replace(case[2], old_logprobs_L=None, behaviour_logprobs_L=None, calibrated_L=None)
    return case[0], case[1], streams, case[3]


def build(vocabulary: int, tokens: int, terms: Terms) -> Case:
    draw = torch.Generator().manual_seed(vocabulary + tokens)
    hidden_LH = torch.randn(tokens, WIDTH, generator=draw)
    weight_VH = torch.randn(vocabulary, WIDTH, generator=draw)
    targets_L = torch.randint(vocabulary, (tokens,), generator=draw)
    logprobs_L, _ = reference_scores(hidden_LH, weight_VH, targets_L, terms.temperature, vocabulary)

    def around(spread: float) -> Tensor:
        return logprobs_L + spread * torch.randn(tokens, generator=draw)

    calibrated_L = torch.rand(tokens, generator=draw) > 0.5
    coefficients_L, advantages_L = torch.rand(tokens, generator=draw), torch.randn(tokens, generator=draw)
    reference_L = around(0.3) if terms.kl_coef else None
    streams = Streams(targets_L, coefficients_L, advantages_L, around(0.3), around(0.7), calibrated_L, reference_L)
    return hidden_LH, weight_VH, streams, terms


def padded(weight_VH: Tensor, rows: int) -> Tensor:
    """Appends padding rows with large values, so that including one in a sum changes the result."""
    return torch.cat([weight_VH, torch.full((rows - weight_VH.shape[0], WIDTH), 9.0)])


def sharded(
    case: Case, rows: int, degree: int, group: dist.ProcessGroup, backend: str, chunk: tuple[int | None, int | None]
) -> Result:
    """The results of the ranks of `group`, with summed hidden gradients and concatenated weight gradients."""
    hidden_LH, weight_VH, streams, terms = case
    before = len(GATHERS)
    columns = rows // degree
    vocabulary, place = weight_VH.shape[0], dist.get_rank(group) * columns
    shard = VocabShard(place, max(0, min(columns, vocabulary - place)), vocabulary, group)
    hidden_LH = hidden_LH.clone().requires_grad_()
    own_VH = padded(weight_VH, rows)[place : place + columns].clone().requires_grad_()

    def gradients(loss: Tensor) -> tuple[Tensor, Tensor]:
        grad_hidden, own_grad = torch.autograd.grad(loss, (hidden_LH, own_VH))
        dist.all_reduce(grad_hidden, group=group)
        grads = [torch.empty_like(own_grad) for _ in range(degree)]
        dist.all_gather(grads, own_grad, group=group)
        return grad_hidden, torch.cat(grads)

    output = policy_head(hidden_LH, own_VH, streams, terms, shard, Chunking(chunk[0], backend))
    grad_hidden, grad_weight = gradients(output.loss)
    scores = score_head(hidden_LH, own_VH, streams.targets_L, terms.temperature, shard, Chunking(chunk[1], backend))
    gathers = len(GATHERS) - before
    plain = logprob_head(hidden_LH, own_VH, streams.targets_L, terms.temperature, shard, Chunking(chunk[0], backend))
    plain_loss = token_objective(*plain, streams, terms).loss_L.sum()
    plain_hidden, plain_weight = gradients(plain_loss)
    return {
        "plain_loss": plain_loss.detach(),
        "plain_grad_hidden": plain_hidden,
        "plain_grad_weight": plain_weight,
        "loss": output.loss.detach(),
        "logprobs": output.logprobs_L,
        "entropy": output.entropy_L,
        "grad_hidden": grad_hidden,
        "grad_weight": grad_weight,
        "scores": scores[0],
        "score_entropy": scores[1],
        "gathers": torch.tensor(gathers),
    }


def reference(case: Case, rows: int) -> Result:
    hidden_LH, weight_VH, streams, terms = case
    hidden_LH = hidden_LH.double().requires_grad_()
    whole_VH = padded(weight_VH, rows).double().requires_grad_()
    output = reference_head(hidden_LH, whole_VH, streams, terms, weight_VH.shape[0])
    output.loss.backward()
    assert hidden_LH.grad is not None and whole_VH.grad is not None
    return {
        "loss": output.loss.detach(),
        "logprobs": output.logprobs_L,
        "entropy": output.entropy_L,
        "grad_hidden": hidden_LH.grad,
        "grad_weight": whole_VH.grad,
        "plain_loss": output.loss.detach(),
        "plain_grad_hidden": hidden_LH.grad,
        "plain_grad_weight": whole_VH.grad,
        "scores": output.logprobs_L,
        "score_entropy": output.entropy_L,
    }


def ranks_at(degree: int) -> range:
    """The last ranks: in a smaller group, no rank of the group equals the rank in the world."""
    return range(WORLD - degree, WORLD)


def rank_main(rank: int, rendezvous: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    for module, constants in SMALL_CHUNKS.items():
        if module.startswith(tuple(BACKENDS)):
            for name, value in constants.items():
                setattr(importlib.import_module(f"icrl_kernels.{module}"), name, value)
    gather = dist.all_gather_into_tensor

    def recorded(output: Tensor, own: Tensor, **options: Any) -> Any:
        GATHERS.append(own.shape)
        return gather(output, own, **options)

    dist.all_gather_into_tensor = recorded
    results = {}
    for degree in (1, 2, 4):
        members = ranks_at(degree)
        group = dist.new_group(list(members))
        if rank not in members:
            continue
        assert isinstance(group, dist.ProcessGroup)
        for backend in BACKENDS:
            results[degree, backend] = {
                name: sharded(case, rows, degree, group, backend, (None, None) if "uncut" in name else (5, 4))
                for name, (case, rows) in cases().items()
            }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Key, dict[str, Result]]]:
    folder = tmp_path_factory.mktemp("head")
    run_ranks(__file__, WORLD, folder, timeout_s=400, TRITON_INTERPRET="1")  # tensors are on the CPU
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.dist
@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_ranks_equal_one_rank(
    by_rank: list[dict[Key, dict[str, Result]]], name: str, degree: int, backend: str
) -> None:
    case, rows = cases()[name]
    truth = reference(case, rows)
    for rank in ranks_at(degree):
        for key, want in truth.items():
            got = by_rank[rank][degree, backend][name][key]
            assert got.shape == want.shape
            error = float((got.double() - want).norm())
            assert error <= 1e-5 * float(want.norm()) + 1e-6, (rank, key, error)


@pytest.mark.dist
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_chunks_do_not_depend_on_a_ranks_padding(by_rank: list[dict[Key, dict[str, Result]]], backend: str) -> None:
    """Otherwise all-gathers would not match. With 50 of 64 columns, the last of four ranks has 2 and the others 16."""
    for name, chunks in (("uncut", 4), ("uncut_empty_shards", 2)):
        # Loss and scores each gather once per chunk.
        assert [int(results[4, backend][name]["gathers"]) for results in by_rank] == [2 * chunks] * WORLD


@pytest.mark.dist
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_outputs_are_bit_identical_on_all_ranks(by_rank: list[dict[Key, dict[str, Result]]], backend: str) -> None:
    for degree in (2, 4):
        for name in cases():
            for key in ("loss", "logprobs", "entropy"):
                values = [by_rank[rank][degree, backend][name][key] for rank in ranks_at(degree)]
                assert all(torch.equal(value, values[0]) for value in values), (degree, name, key)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
