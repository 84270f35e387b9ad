"""Inputs of the head, the ways of computing it, and their tolerances against float64."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from icrl_kernels import (
    Chunking,
    HeadOutput,
    Streams,
    Terms,
    VocabShard,
    policy_head,
    reference_head,
    reference_scores,
    score_head,
)

WIDTH = 16


@dataclass(frozen=True)
class How:
    """A way of computing the head, and its tolerances: relative to the norm, and per element where the truth is 0."""

    backend: str
    dtype: torch.dtype
    tolerance: float = 1e-5
    floor: float = 1e-6
    logits: str = "fp32"

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    def chunking(self, tokens: int | None) -> Chunking:
        return Chunking(tokens, self.backend, self.logits)

    def device(self) -> torch.device:
        """The device of the kernels: the GPU if there is one; otherwise the CPU, with triton's interpreter."""
        return torch.device("cuda" if self.backend == "triton" and torch.cuda.is_available() else "cpu")

    def put(self, tensor: Tensor) -> Tensor:
        """Moves a tensor to the device; floating tensors are converted to the dtype."""
        return tensor.to(self.device(), self.dtype if tensor.is_floating_point() else None)


EXACT = How("torch", torch.float64, 1e-12, 1e-15)
TORCH = How("torch", torch.float32)
TRITON = How("triton", torch.float32)
TRITON_BF16 = How("triton", torch.bfloat16)
TRITON_BF16_LOGITS = How("triton", torch.bfloat16, logits="bf16")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
WAYS = [EXACT, TORCH, pytest.param(TRITON, marks=needs_triton)]
"""Parametrizes tests that every way must pass."""


def make_inputs(
    tokens: int, rows: int, terms: Terms, seed: int = 0, scale: float = 1.0, vocabulary: int | None = None
) -> tuple[Tensor, Tensor, Streams]:
    """Float64 hidden states and weight, and streams whose old log-probs are near the policy's own.

    All values are exact in float32, so that a head with a narrower dtype gets the same values.
    """
    draw = torch.Generator().manual_seed(seed)
    vocabulary = vocabulary or rows
    hidden_LH = torch.randn(tokens, WIDTH, generator=draw).double()
    weight_VH = (scale * torch.randn(rows, WIDTH, generator=draw)).double()
    targets_L = torch.randint(vocabulary, (tokens,), generator=draw)
    logprobs_L, _ = reference_scores(hidden_LH, weight_VH, targets_L, terms.temperature, vocabulary)

    def around(spread: float) -> Tensor:
        return (logprobs_L + spread * torch.randn(tokens, generator=draw)).float().double()

    streams = Streams(
        targets_L=targets_L,
        coefficients_L=torch.rand(tokens, generator=draw) * (torch.rand(tokens, generator=draw) > 0.2),
        advantages_L=torch.randn(tokens, generator=draw).double(),
        old_logprobs_L=around(0.3),
        behaviour_logprobs_L=around(0.7),
        calibrated_L=torch.rand(tokens, generator=draw) > 0.5,
        reference_logprobs_L=around(0.3) if terms.kl_coef else None,
    )
    return hidden_LH, weight_VH, streams


def on_policy(streams: Streams) -> Streams:
    """The streams without old log-probs, for tests that change hidden states or weight, which would invalidate them."""
    return replace(streams, old_logprobs_L=None, behaviour_logprobs_L=None, calibrated_L=None)


Result = tuple[HeadOutput, Tensor, Tensor]
"""Output and gradients of hidden states and weight, on the CPU."""


def run_head(
    hidden_LH: Tensor, weight_VH: Tensor, streams: Streams, terms: Terms, vocabulary: int, chunk: int | None, how: How
) -> Result:
    """The head in the dtype and on the device of `how`."""
    hidden_LH, weight_VH = (how.put(t).detach().clone().requires_grad_() for t in (hidden_LH, weight_VH))
    shard, chunking = VocabShard.whole(vocabulary), how.chunking(chunk)
    output = policy_head(hidden_LH, weight_VH, put_streams(streams, how), terms, shard, chunking)
    output.loss.backward()
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    return _on_cpu(output), hidden_LH.grad.cpu(), weight_VH.grad.cpu()


def run_reference(hidden_LH: Tensor, weight_VH: Tensor, streams: Streams, terms: Terms, vocabulary: int) -> Result:
    """The eager head in the dtype of the inputs."""
    hidden_LH, weight_VH = (t.detach().clone().requires_grad_() for t in (hidden_LH, weight_VH))
    output = reference_head(hidden_LH, weight_VH, streams, terms, vocabulary)
    output.loss.backward()
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    return _on_cpu(output), hidden_LH.grad, weight_VH.grad


def run_scores(
    hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor, temperature: float, vocabulary: int, chunk: int, how: How
) -> tuple[Tensor, Tensor]:
    shard = VocabShard.whole(vocabulary)
    found = score_head(*map(how.put, (hidden_LH, weight_VH, targets_L)), temperature, shard, how.chunking(chunk))
    return found[0].cpu(), found[1].cpu()


def put_streams(streams: Streams, how: How) -> Streams:
    given = {f.name: getattr(streams, f.name) for f in fields(streams)}
    if how.dtype == torch.bfloat16:
        how = replace(how, dtype=torch.float32)  # as in training: only hidden states and weights are bf16
    return replace(streams, **{name: how.put(stream) for name, stream in given.items() if stream is not None})


def _on_cpu(output: HeadOutput) -> HeadOutput:
    tensors = {name: value for name, value in vars(output).items() if isinstance(value, Tensor)}
    return replace(output, **{name: tensor.detach().cpu() for name, tensor in tensors.items()})


def assert_near(value: Tensor, truth: Tensor, tolerance: float = 1e-5, floor: float = 1e-6) -> None:
    """The error's norm is within `tolerance` of the truth's, or `floor` per element if the truth is nearly 0."""
    error = (value.double() - truth.double()).norm()
    assert error <= tolerance * truth.double().norm() + floor * max(1, truth.numel()) ** 0.5, float(error)


def assert_same(head: Result, truth: Result, how: How, gradients: How | None = None) -> None:
    """Outputs within the errors of `how`, gradients within those of `gradients` if they are given."""
    gradients = gradients or how
    # The loss is a sum whose terms cancel, so the error per token is compared.
    assert_near(head[0].loss, truth[0].loss, how.tolerance, how.floor * max(1, truth[0].logprobs_L.numel()))
    for name in ("logprobs_L", "entropy_L", "ratio_L", "calibration_weight_L"):
        assert_near(getattr(head[0], name), getattr(truth[0], name), how.tolerance, how.floor)
    assert_near(head[1], truth[1], gradients.tolerance, gradients.floor)
    assert_near(head[2], truth[2], gradients.tolerance, gradients.floor)


def tiny_peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The GPU benchmark's peers with a small model on the CPU, the kernels in Triton's interpreter."""
    module = import_module("head_cuda_peers")
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "VOCABULARY", 400)
    monkeypatch.setattr(module, "MODELS", {"tiny": 32})
    monkeypatch.setattr(module, "Chunking", partial(Chunking, backend="triton"))
    return module


def clipped(output: HeadOutput) -> Tensor:
    return output.clipped_low_L | output.clipped_high_L
