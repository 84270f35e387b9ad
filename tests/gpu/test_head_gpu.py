"""Tests of the head that need a GPU: long inputs, large buffers, compilation, bf16 hardware.

The tests of tests/cpu/test_head*.py and test_triton_kernels.py run on the GPU too, if there is one.
"""

from __future__ import annotations

import pytest
import torch
from head_cases import assert_near

from icrl_kernels import Chunking, MainGrad, Streams, Terms, VocabShard, policy_head, reference_head, score_head
from icrl_kernels.chunking import TokenOutputs

pytestmark = pytest.mark.gpu


def inputs(tokens: int, width: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Streams]:
    draw = torch.Generator("cuda").manual_seed(0)
    hidden_LH = torch.randn(tokens, width, generator=draw, device="cuda").to(dtype)
    weight_VH = (torch.randn(columns, width, generator=draw, device="cuda") * 2 / width**0.5).to(dtype)
    targets_L = torch.randint(columns, (tokens,), generator=draw, device="cuda")
    advantages_L = torch.randn(tokens, generator=draw, device="cuda")
    coefficients_L = torch.full_like(advantages_L, 1 / tokens)
    return hidden_LH.requires_grad_(), weight_VH.requires_grad_(), Streams(targets_L, coefficients_L, advantages_L)


@pytest.mark.parametrize("tokens", [65_537, 131_072])
def test_long_inputs_in_one_chunk(tokens: int) -> None:
    hidden_LH, weight_VH, streams = inputs(tokens, 64, 1003, torch.bfloat16)
    shard, terms = VocabShard.whole(1003), Terms(entropy_coef=0.01)
    output = policy_head(hidden_LH, weight_VH, streams, terms, shard, Chunking(tokens))
    output.loss.backward()
    truth = reference_head(hidden_LH.double(), weight_VH.double(), streams, terms, 1003)
    assert_near(output.logprobs_L, truth.logprobs_L)
    grads = torch.autograd.grad(truth.loss, (hidden_LH, weight_VH))
    for got, want in zip((hidden_LH.grad, weight_VH.grad), grads, strict=True):
        assert got is not None
        assert_near(got, want, 0.01)


def test_a_buffer_of_more_than_2_to_the_31_logits() -> None:
    tokens, columns = 16_384, 151_936
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    hidden_LH, weight_VH, streams = inputs(tokens, 64, columns, torch.bfloat16)
    shard = VocabShard.whole(columns)
    assert tokens * columns > 2**31
    large = score_head(hidden_LH, weight_VH, streams.targets_L, 1.0, shard, Chunking(tokens))
    small = score_head(hidden_LH, weight_VH, streams.targets_L, 1.0, shard, Chunking(512))
    assert_near(large[0], small[0])
    assert_near(large[1], small[1])


def test_changed_lengths_and_bounds_cause_no_compilation() -> None:
    from icrl_kernels import triton_kernels

    kernels = [getattr(triton_kernels, n) for n in ("split_statistics", "token_objective", "logit_gradients")]

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def run(tokens: int, terms: Terms) -> None:
        hidden_LH, weight_VH, streams = inputs(tokens, 64, 1003, torch.bfloat16)
        policy_head(hidden_LH, weight_VH, streams, terms, VocabShard.whole(1003)).loss.backward()

    run(256, Terms())
    before = compiled()
    assert before >= 3
    for tokens in (1, 16, 17, 255, 1000, 4096):
        run(tokens, Terms())
    run(100, Terms(temperature=0.7, clip_low=0.1, clip_high=0.4, w_max=3.0))
    assert compiled() == before


@pytest.mark.parametrize("logits", ["fp32", "bf16"])
def test_bf16_heads_are_as_precise_as_torchs(logits: str) -> None:
    hidden_LH, weight_VH, streams = inputs(512, 1024, 32_003, torch.bfloat16)
    shard, terms = VocabShard.whole(32_003), Terms()
    output = policy_head(hidden_LH, weight_VH, streams, terms, shard, Chunking(logits=logits))
    output.loss.backward()
    truth = reference_head(hidden_LH.double(), weight_VH.double(), streams, terms, 32_003)
    eager = reference_head(hidden_LH, weight_VH, streams, terms, 32_003)
    own, theirs = ((o.logprobs_L.double() - truth.logprobs_L).abs().mean() for o in (output, eager))
    assert own <= (1e-5 if logits == "fp32" else 2 * theirs)
    exact = torch.autograd.grad(truth.loss, (hidden_LH, weight_VH))
    plain = torch.autograd.grad(eager.loss, (hidden_LH, weight_VH))
    for got, want, other in zip((hidden_LH.grad, weight_VH.grad), exact, plain, strict=True):
        assert got is not None
        assert (got.double() - want).norm() <= 2 * (other.double() - want).norm()


def test_main_grad_gets_fp32_sums_of_bf16_products() -> None:
    hidden_LH, weight_VH, streams = inputs(300, 256, 5000, torch.bfloat16)
    shard, buffer_VH = VocabShard.whole(5000), torch.zeros(5000, 256, device="cuda")
    for _ in range(3):
        policy_head(
            hidden_LH, weight_VH, streams, Terms(), shard, Chunking(128), main_grad=MainGrad(buffer_VH)
        ).loss.backward()
    truth = reference_head(hidden_LH.double(), weight_VH.double(), streams, Terms(), 5000)
    (want,) = torch.autograd.grad(truth.loss, (weight_VH,))
    assert weight_VH.grad is None
    assert_near(buffer_VH / 3, want, 0.01)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_gradients_may_overwrite_their_logits(entropy_coef: float) -> None:
    """bf16 gradients overwrite the front half of an fp32 row that other warps may still read. Racecheck covers only
    shared memory, so this test recomputes every element of many rows several times from a copy of the logits."""
    from icrl_kernels.triton_chunks import TritonChunks

    rows, columns = 3000, 151_936
    hidden_LH, weight_VH, streams = inputs(rows, 64, columns, torch.bfloat16)
    chunks = TritonChunks(hidden_LH, weight_VH, 0.9, VocabShard.whole(columns), rows, "fp32")
    outputs, terms = TokenOutputs.empty(streams.targets_L, torch.float32), Terms(0.9, entropy_coef=entropy_coef)
    for turn in range(4):
        draw = torch.Generator("cuda").manual_seed(turn)
        chunks.buffer_CV.fill_(float("nan"))  # padding columns and stale rows must not be used
        chunks.buffer_CV[:, :columns].normal_(0.0, 3.0, generator=draw)
        logits_CV = chunks.buffer_CV[:, :columns].clone()
        slopes_4C = chunks.objective(slice(0, rows), streams, terms, outputs)
        got_CV = chunks.logit_gradients(streams.targets_L, outputs.entropy_L, slopes_4C, entropy_coef != 0)
        assert got_CV.dtype == torch.bfloat16
        for start in range(0, rows, 250):
            part = slice(start, start + 250)
            want_CV = exact_gradients(logits_CV[part], streams.targets_L[part], slopes_4C[2:, part], 0.9)
            off_CV = (got_CV[part].double() - want_CV).abs()
            assert bool((off_CV <= 2**-8 * want_CV.abs() + 1e-12).all()), (turn, start, float(off_CV.max()))


def exact_gradients(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, slopes_2C: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Float64 gradients from the derivatives of the loss with respect to log-prob and entropy."""
    logprobs_CV = (logits_CV.double() / temperature).log_softmax(-1)
    p_CV = logprobs_CV.exp()
    entropy_C1 = -(p_CV * logprobs_CV).sum(-1, keepdim=True)
    hot_CV = torch.zeros_like(p_CV).scatter_(1, targets_C[:, None], 1.0)
    g_C1, h_C1 = slopes_2C.double()[..., None]
    return (g_C1 * (hot_CV - p_CV) - h_C1 * p_CV * (logprobs_CV + entropy_C1)) / temperature
