"""Log-prob and entropy of each token as differentiable tensors, for losses that are plain functions of them.

The backward pass recomputes the logits of each chunk, so only one chunk exists at a time. This costs one more matrix
product than `head.policy_head`, which has a fixed objective and computes the gradient in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icrl_kernels.checks import check_products, check_targets
from icrl_kernels.chunking import Chunking, Chunks, Slopes, spans
from icrl_kernels.head import MainGrad, chunks_of, gradients_of, scored
from icrl_kernels.vocabulary import VocabShard


def logprob_head(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    targets_L: Tensor,
    temperature: float,
    shard: VocabShard,
    chunking: Chunking = Chunking(),  # noqa: B008 (frozen)
    main_grad: MainGrad | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, [L] each, both differentiable once.

    A token whose two derivatives are 0 adds nothing to any gradient, even if its logits are not finite. With
    `main_grad`, the gradient of the weight is added to its buffer in the backward pass, and `MainGrad.scale` must be 1.
    All other arguments, dtypes, communication and errors are as in `head.policy_head`. The loss, and so the
    derivatives, must be the same on all ranks of the group.
    """
    buffer_VH = None if main_grad is None else main_grad.buffer_VH
    check_products(hidden_LH, weight_VH, targets_L, temperature, shard, chunking, buffer_VH)
    check_targets(targets_L, shard)
    if main_grad is not None and main_grad.scale != 1.0:
        raise ValueError(f"main_grad.scale: expected 1 for logprob_head, got {main_grad.scale}")
    chunks = chunks_of(hidden_LH, weight_VH, temperature, shard, chunking)
    logprobs_L, entropy_L = _LogProbs.apply(hidden_LH, weight_VH, targets_L, chunks, main_grad)
    return logprobs_L, entropy_L


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor, chunks: Chunks, main_grad: MainGrad | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_LH, weight_VH, targets_L)
        ctx.chunks, ctx.main_grad = chunks, main_grad
        ctx.set_materialize_grads(False)
        return scored(chunks, targets_L)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_logprob_L: Tensor | None, slope_entropy_L: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_LH, weight_VH, targets_L = ctx.saved_tensors
        main_grad, chunks = ctx.main_grad, ctx.chunks
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] or main_grad is not None)
        grads = gradients_of(hidden_LH, weight_VH, chunks.dtype, main_grad, needs)
        if slope_logprob_L is None:
            slope_logprob_L = torch.zeros_like(targets_L, dtype=chunks.dtype)
        silent_L = slope_logprob_L == 0
        if slope_entropy_L is not None:
            silent_L &= slope_entropy_L == 0
        for span in spans(targets_L.shape[0], chunks.tokens):
            entropy_C = None if slope_entropy_L is None else slope_entropy_L[span]
            chunks.backward(span, targets_L[span], Slopes(slope_logprob_L[span], entropy_C, silent_L[span]), grads)
        weight_grad = None if main_grad is not None or grads.weight_VH is None else grads.weight_VH.to(weight_VH.dtype)
        return grads.hidden_LH, weight_grad, None, None, None
