"""The policy head, from hidden states to loss and gradients, with at most one chunk of logits in memory.

All inputs of the objective except the log-prob are known before the head runs. So the gradient is computed per chunk in
the forward pass, from the chunk's softmax, and nothing is computed twice. `torch_chunks` computes a chunk on a CPU,
`triton_chunks` on a GPU; both implement the same mathematics (docs/KERNEL.md) and the contract documented here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icrl_kernels.checks import check_objective, check_products, check_targets
from icrl_kernels.chunking import Chunking, Chunks, Gradients, TokenOutputs, spans
from icrl_kernels.objective import Streams, Terms
from icrl_kernels.torch_chunks import TorchChunks
from icrl_kernels.vocabulary import VocabShard


@dataclass(frozen=True)
class MainGrad:
    """A gradient buffer, like Megatron's main_grad, to which the weight's gradient is added during the forward pass.

    The weight then gets no `.grad` from the head. Every forward pass with gradients enabled adds to the buffer, and
    this cannot be undone. Under torch.utils.checkpoint there is one such pass with `use_reentrant=True`. With
    `use_reentrant=False` there is only one if nothing after the head in the checkpointed function saves a tensor and
    early stopping is on (the default); otherwise the head runs again and adds its gradient again. Keep the head outside
    of checkpointed functions.
    """

    buffer_VH: Tensor
    """float32 (float64 for float64 weights), in the weight's shape."""
    scale: float = 1.0
    """Factor applied to the loss before backward(); the backward pass asserts it."""


@dataclass(frozen=True)
class HeadOutput:
    """The result of `policy_head`. Per-token tensors are [L], detached, float32 (float64 for float64 inputs)."""

    loss: Tensor
    """Scalar: the sum over tokens; differentiable in hidden states and weight, once."""
    logprobs_L: Tensor
    entropy_L: Tensor
    ratio_L: Tensor
    calibration_weight_L: Tensor
    clipped_low_L: Tensor
    clipped_high_L: Tensor
    """bool, as in `objective.TokenObjective`."""
    non_finite: Tensor
    """int64 scalar: tokens with a nonzero coefficient whose logits or loss are not finite; if above 0, skip the
    step."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Additional values per token, [L]: the fused objective has none, a plain loss may."""


def policy_head(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    streams: Streams,
    terms: Terms,
    shard: VocabShard,
    chunking: Chunking = Chunking(),  # noqa: B008 (frozen)
    main_grad: MainGrad | None = None,
) -> HeadOutput:
    """Loss of Eq. 6 and its gradients for L loss tokens (L may be 0).

    Args:
        hidden_LH: last hidden states of the loss tokens, [L, H], contiguous; float32 or bfloat16, on a CPU also float64
            and float16; the same on all ranks of `shard.group`.
        weight_VH: this rank's rows of the output layer, [V, H], contiguous, in the dtype of `hidden_LH`. All ranks of
            the group have the same number, padding included, because it determines the chunks.
        streams: [L] tensors, the same on all ranks of the group.
        terms: the scalars of the objective.
        shard: the vocabulary columns that the weight's rows represent.
        chunking: chunk size and implementation.
        main_grad: buffer for the gradient of the weight, instead of `.grad`.

    All sums are float32 (float64 for float64 inputs), whatever the dtype of the inputs, and so are the logits unless
    `chunking` says otherwise. Ranks communicate one all-gather per chunk, of four numbers per token. The gradient of
    `hidden_LH` is partial: the sum over this rank's columns. The caller, which made `hidden_LH` the same on all ranks,
    sums it over the group. The gradients are kept until the backward pass, which scales them in place and returns them,
    once. They are not saved through autograd. Under torch.utils.checkpoint a chunk is computed at most twice: with
    `use_reentrant=True` once without gradients and once with them; with `use_reentrant=False` once, and once more if
    something after the head in the checkpointed function saves a tensor.

    Raises:
        ValueError: names the argument, the expected and the actual value.
    """
    wants = torch.is_grad_enabled()
    needs = (wants and hidden_LH.requires_grad, wants and (weight_VH.requires_grad or main_grad is not None))
    buffer_VH = None if main_grad is None else main_grad.buffer_VH
    check_products(hidden_LH, weight_VH, streams.targets_L, terms.temperature, shard, chunking, buffer_VH)
    check_objective(hidden_LH, streams, terms, shard)
    chunks = chunks_of(hidden_LH, weight_VH, terms.temperature, shard, chunking)
    return HeadOutput(*_Head.apply(hidden_LH, weight_VH, chunks, streams, terms, main_grad, needs))


@torch.no_grad()
def score_head(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    targets_L: Tensor,
    temperature: float,
    shard: VocabShard,
    chunking: Chunking = Chunking(),  # noqa: B008 (frozen)
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, [L] each, without gradients: the same code as `policy_head`'s first half.

    Arguments, dtypes, communication and errors are as in `policy_head`.
    """
    check_products(hidden_LH, weight_VH, targets_L, temperature, shard, chunking)
    check_targets(targets_L, shard)
    return scored(chunks_of(hidden_LH, weight_VH, temperature, shard, chunking), targets_L)


def scored(chunks: Chunks, targets_L: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, [L] each, chunk by chunk."""
    logprobs_L, entropy_L = (torch.empty_like(targets_L, dtype=chunks.dtype) for _ in range(2))
    for span in spans(targets_L.shape[0], chunks.tokens):
        chunks.score(span, targets_L[span], logprobs_L[span], entropy_L[span])
    return logprobs_L, entropy_L


def chunks_of(
    hidden_LH: Tensor, weight_VH: Tensor, temperature: float, shard: VocabShard, chunking: Chunking
) -> Chunks:
    if chunking.backend == "torch" or (chunking.backend == "auto" and not hidden_LH.is_cuda):
        return TorchChunks(hidden_LH, weight_VH, temperature, shard, chunking.tokens)
    if not hidden_LH.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ValueError("chunking.backend: expected torch for CPU tensors, got triton (or set TRITON_INTERPRET=1)")
    from icrl_kernels.triton_chunks import TritonChunks  # lazy: triton is not installed everywhere

    return TritonChunks(hidden_LH, weight_VH, temperature, shard, chunking.tokens, chunking.logits)


class _Head(torch.autograd.Function):
    """Computes loss and gradients in the forward pass; the backward pass only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        chunks: Chunks,
        streams: Streams,
        terms: Terms,
        main_grad: MainGrad | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:
        tokens = hidden_LH.shape[0]
        grads = gradients_of(hidden_LH, weight_VH, chunks.dtype, main_grad, needs)
        out = TokenOutputs.empty(streams.targets_L, chunks.dtype)
        for span in spans(tokens, chunks.tokens):
            chunks.train(span, streams.slice(span), terms, out, grads)
        ctx.grads, ctx.main_scale = grads, None if main_grad is None else main_grad.scale
        non_finite = (~out.finite_L & (streams.coefficients_L != 0)).sum()
        scores = (out.logprobs_L, out.entropy_L, out.ratio_L, out.calibration_weight_L)
        rest = (*scores, out.clipped_low_L, out.clipped_high_L, non_finite)
        ctx.mark_non_differentiable(*rest)
        return out.loss_L.sum(), *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("policy_head's gradients were used by an earlier backward pass: call it again")
        grads: Gradients = ctx.grads
        # Dropping the references lets autograd take over the tensors instead of copying them.
        ctx.grads = None
        # A one-element vector makes torch multiply in its dtype; a scalar would be rounded to bf16 first.
        grad_hidden = None if grads.hidden_LH is None else grads.hidden_LH.mul_(grad_loss[None])
        if ctx.main_scale is not None:
            # On a GPU the comparison is asynchronous: the host does not wait for it.
            torch._assert_async(grad_loss == ctx.main_scale, "the loss was not scaled by MainGrad.scale")
            return grad_hidden, *[None] * 6
        return grad_hidden, None if grads.weight_VH is None else grads.weight_VH.mul_(grad_loss), *[None] * 5


def gradients_of(
    hidden_LH: Tensor, weight_VH: Tensor, dtype: torch.dtype, main_grad: MainGrad | None, needs: tuple[bool, bool]
) -> Gradients:
    hidden = torch.empty_like(hidden_LH) if needs[0] else None
    if not needs[1]:
        return Gradients(hidden, None)
    if main_grad is not None:
        return Gradients(hidden, main_grad.buffer_VH, main_grad.scale)
    return Gradients(hidden, torch.zeros_like(weight_VH, dtype=dtype))
