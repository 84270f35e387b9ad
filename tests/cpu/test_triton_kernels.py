"""The Triton kernels: in the interpreter, and as compiled for an H100, which needs no GPU."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import python
from head_cases import TRITON, assert_near, make_inputs, needs_triton, on_policy, run_head, run_reference, run_scores

from icrl_kernels import Terms, VocabShard

pytestmark = needs_triton

COMPILE = Path(__file__).parents[1] / "compile_kernels.py"


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """The report of `compile_kernels.py` for each kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = python(COMPILE, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_hopper_without_spilling(compiled: dict[str, dict[str, Any]]) -> None:
    from icrl_kernels import triton_chunks

    assert len(compiled) == 12
    for name, report in compiled.items():
        assert report["cubin_bytes"], name
        assert report["stack_bytes"] == 0, (name, report)
        # A multiprocessor has 65536 registers; all programs launched on it must fit together.
        assert 0 < report["registers"] * report["threads"] * triton_chunks.TUNING[9].programs <= 65536, (name, report)
        assert report["shared_bytes"] <= 48 * 1024, (name, report)


def test_logits_are_accessed_as_vectors(compiled: dict[str, dict[str, Any]]) -> None:
    """If columns are a multiple of 16, as in every model; otherwise the mask causes 16-bit accesses."""
    for name, report in compiled.items():
        if name.startswith(("split_statistics", "logit_gradients")):
            whole = "odd" not in name
            assert (report["vector_loads"] > 0) == whole, (name, report)
            assert (report["vector_stores"] > 0) == (whole and name.startswith("logit_gradients")), (name, report)
            # docs/KERNEL.md has the values of triton 3.7.1 and 3.8.0; this detects a large increase.
            assert report["instructions_an_element"] <= (22 if whole else 32), (name, report)


def test_row_addresses_are_64_bit(compiled: dict[str, dict[str, Any]]) -> None:
    """rows * stride exceeds 2^31 with 16384 tokens of 151936 columns."""
    for name in ("split_statistics", "logit_gradients"):
        assert compiled[name]["row_multiplications"] == ["i64"] * len(compiled[name]["row_multiplications"])
        assert compiled[name]["row_multiplications"]


def test_lengths_temperature_and_bounds_are_not_compiled_in(compiled: dict[str, dict[str, Any]]) -> None:
    """Only block sizes and the set of streams are constants, and only a model's dimensions are specialized."""
    constant = {"BLOCK", "ROWS", "HAS_OLD", "HAS_BEHAVIOUR", "HAS_REFERENCE", "HAS_ENTROPY"}
    for name, report in compiled.items():
        assert set(report["constants"]) <= constant, name
        assert set(report["specialised"]) <= {"columns", "stride", "gradient_stride"}, name


def test_scalars_are_passed_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would compile another kernel for integers, and a third one for the integer 1."""
    from icrl_kernels import triton_kernels

    kernel, launched = triton_kernels.token_objective, []

    class Recorder:
        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: (launched.append(args), kernel[grid](*args, **options))

    monkeypatch.setattr(triton_kernels, "token_objective", Recorder())
    whole = Terms(temperature=1, clip_low=0, clip_high=1, w_max=2, kl_coef=1, entropy_coef=1, shaping_gamma=1)
    hidden_LH, weight_VH, streams = make_inputs(3, 20, whole)
    run_head(hidden_LH, weight_VH, streams, whole, 20, None, TRITON)
    (args,) = launched
    scalars = [arg for arg in args if not isinstance(arg, torch.Tensor)]
    assert [type(scalar) for scalar in scalars] == [int] * 2 + [float] * 8  # parts and rows are integers


@pytest.mark.parametrize("logits", ["fp32", "bf16"])
def test_full_vocabulary_of_qwen3(logits: str) -> None:
    vocabulary = 151936
    hidden_LH, weight_VH, streams = make_inputs(3, vocabulary, Terms(), scale=0.5)
    streams.targets_L[:] = torch.tensor([0, 77777, vocabulary - 1])
    streams = on_policy(streams)
    hidden_LH, weight_VH = hidden_LH.bfloat16().double(), weight_VH.bfloat16().double()
    truth = run_reference(hidden_LH, weight_VH, streams, Terms(), vocabulary)
    how = replace(TRITON, dtype=torch.bfloat16, logits=logits)
    head = run_head(hidden_LH, weight_VH, streams, Terms(), vocabulary, None, how)
    # bf16 logits of up to 8 are rounded by up to 0.016.
    assert_near(head[0].logprobs_L, truth[0].logprobs_L, *((1e-5, 1e-6) if logits == "fp32" else (1e-3, 1e-2)))
    assert_near(head[1], truth[1], 0.005 if logits == "fp32" else 0.02)


def test_targets_at_the_edges_of_splits_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from icrl_kernels import triton_chunks

    monkeypatch.setattr(triton_chunks, "_tuning", lambda device: triton_chunks.Tuning(16, 4, 8))
    edges = [0, 15, 16, 31, 32, 47, 48, 63, 64, 69]
    terms = Terms(entropy_coef=0.02)
    hidden_LH, weight_VH, streams = make_inputs(len(edges), 70, terms)
    streams.targets_L[:] = torch.tensor(edges)
    streams = on_policy(streams)
    truth = run_reference(hidden_LH, weight_VH, streams, terms, 70)
    for chunk in (1, 3, 10):
        head = run_head(hidden_LH, weight_VH, streams, terms, 70, chunk, TRITON)
        assert_near(head[0].logprobs_L, truth[0].logprobs_L)
        assert_near(head[1], truth[1])
        assert_near(head[2], truth[2])


def test_bf16_gradients_may_overwrite_fp32_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients overwrite the front of each row while the rest is still read, over many blocks."""
    from icrl_kernels import triton_chunks

    monkeypatch.setattr(triton_chunks, "_tuning", lambda device: triton_chunks.Tuning(16, 4, 8))
    hidden_LH, weight_VH, streams = make_inputs(9, 333, Terms(), scale=0.5)
    streams = on_policy(streams)
    hidden_LH, weight_VH = hidden_LH.bfloat16().double(), weight_VH.bfloat16().double()
    truth = run_reference(hidden_LH, weight_VH, streams, Terms(), 333)
    head = run_head(hidden_LH, weight_VH, streams, Terms(), 333, 4, replace(TRITON, dtype=torch.bfloat16))
    assert_near(head[1], truth[1], 0.005)
    assert_near(head[2], truth[2], 0.005)


def test_low_temperature_is_precise() -> None:
    hidden_LH, weight_VH, streams = make_inputs(8, 200, Terms(temperature=0.05))
    truth = run_reference(hidden_LH, weight_VH, on_policy(streams), Terms(temperature=0.05), 200)
    logprobs_L, entropy_L = run_scores(hidden_LH, weight_VH, streams.targets_L, 0.05, 200, 8, TRITON)
    # float32 products have rounding errors of 1e-6, which are divided by 0.05.
    assert_near(logprobs_L, truth[0].logprobs_L, 1e-5, 1e-4)
    assert_near(entropy_L, truth[0].entropy_L, 1e-5, 1e-4)


def test_eight_vocabulary_shards_give_the_same_result_as_one() -> None:
    """Statistics of eight ranks are merged as after an all-gather; targets are at the edges of shards."""
    from icrl_kernels.triton_chunks import TritonChunks
    from icrl_kernels.triton_kernels import score_tokens

    tokens, columns, ranks = 9, 24, 8
    hidden_LH, weight_VH, streams = make_inputs(tokens, columns * ranks, Terms(temperature=0.7))
    streams.targets_L[:] = torch.tensor([0, 23, 24, 47, 48, 95, 96, 190, 191])
    truth = run_reference(hidden_LH, weight_VH, on_policy(streams), Terms(temperature=0.7), columns * ranks)[0]
    targets_L, parts = TRITON.put(streams.targets_L), []
    for rank in range(ranks):
        shard = VocabShard(rank * columns, columns, columns * ranks)
        own_VH = TRITON.put(weight_VH[shard.start : shard.start + columns])
        chunks = TritonChunks(TRITON.put(hidden_LH), own_VH, 0.7, shard, tokens, "fp32")
        chunks._logits(slice(0, tokens))
        parts.append(chunks.statistics(targets_L))
    partials = torch.cat(parts)
    assert partials.shape == (ranks, 4, tokens)
    logprobs_L, entropy_L = torch.empty(tokens, device=partials.device), torch.empty(tokens, device=partials.device)
    score_tokens[(1,)](partials, logprobs_L, entropy_L, ranks, tokens, 1 / 0.7, math.log2(math.e) / 0.7, ROWS=16)
    assert_near(logprobs_L.cpu(), truth.logprobs_L)
    assert_near(entropy_L.cpu(), truth.entropy_L)


@pytest.mark.parametrize("width", [4096, 2560])
@pytest.mark.parametrize("tokens", [8192, 16384])
@pytest.mark.parametrize("logit_bytes", [4, 2])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_chunk_plan_never_has_more_waves(width: int, tokens: int, logit_bytes: int, tensor_parallel: int) -> None:
    """For d(hidden) of Qwen3-8B and 4B on an H100's 132 multiprocessors; the logit buffer stays within its limit."""
    from icrl_kernels.triton_chunks import CHUNK_ALIGN, CHUNK_BYTES, chunk_rows, waves

    per_token = 151936 // tensor_parallel * logit_bytes
    rows = chunk_rows(tokens, per_token, width, 132)
    fewest = -(-tokens // (CHUNK_BYTES // per_token // CHUNK_ALIGN * CHUNK_ALIGN))
    even = -(-tokens // fewest // CHUNK_ALIGN) * CHUNK_ALIGN
    assert rows % CHUNK_ALIGN == 0 and rows * per_token <= CHUNK_BYTES
    assert waves(tokens, rows, width, 132) <= waves(tokens, even, width, 132)
    assert -(-tokens // rows) <= fewest + 1


def test_chunks_of_an_8b_head_fill_an_h100() -> None:
    from icrl_kernels.triton_chunks import chunk_rows, waves

    assert waves(8192, 2816, 4096, 132) == 9
    assert chunk_rows(8192, 151936 * 4, 4096, 132) == 3072 and waves(8192, 3072, 4096, 132) == 8
    assert chunk_rows(1, 151936 * 4, 4096, 132) == 128
