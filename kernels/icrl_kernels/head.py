"""The head of the policy, from hidden states to loss and gradients, never holding more than a chunk of logits.

Everything but the log-prob is known of a token before the head runs, so the gradient is formed chunk by chunk in the
forward pass, while the chunk's softmax is at hand, and nothing is computed twice. With e = exp(z - m) in the buffer,
q = exp(m - M) / S and the derivatives g = dloss/dlogprob and b = -dloss/dentropy of a token:

    dloss/dz_v = g (1[v = target] - p_v) + b p_v (log p_v + H)        p_v = q e_v

The factor of a row and the 1[v = target] are moved out of the buffer, into the [C, H] sides of the two products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icrl_kernels.checks import check_objective, check_products
from icrl_kernels.objective import Streams, Terms, TokenObjective, token_objective
from icrl_kernels.vocabulary import RowSoftmax, VocabShard, row_softmax_, row_tiles

CHUNK_TOKENS = 128
"""Tokens whose logits exist at one time, where the caller does not say."""
BLOCK_ROWS = 8192
"""Rows of the weight that a product takes at a time, after converting them where they are of half precision."""


@dataclass(frozen=True)
class HeadOutput:
    """What `policy_head` returns. Per-token tensors are [L], detached, float64 for float64 inputs and else float32."""

    loss: Tensor
    """Scalar: the plain sum over tokens; differentiable in hidden states and weight, once."""
    logprobs_L: Tensor
    entropy_L: Tensor
    ratio_L: Tensor
    calibration_weight_L: Tensor
    clipped_low_L: Tensor
    clipped_high_L: Tensor
    """bool, as in `objective.TokenObjective`."""
    non_finite: Tensor
    """int64 scalar: tokens with a coefficient whose logits or loss are not finite; above 0, drop the step."""


def policy_head(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    streams: Streams,
    terms: Terms,
    shard: VocabShard,
    chunk_tokens: int = CHUNK_TOKENS,
) -> HeadOutput:
    """Loss of Eq. 6 and its gradients for L loss tokens (L may be 0).

    Args:
        hidden_LH: last hidden states of the loss tokens, [L, H], float32, float64, bfloat16 or float16; the same on all
            ranks of `shard.group`.
        weight_VH: this rank's rows of the output layer, [V, H], in the dtype of `hidden_LH`.
        streams: [L] tensors, the same on all ranks of the group.
        terms: the scalars of the objective.
        shard: which columns of the vocabulary the rows of the weight are.
        chunk_tokens: tokens whose logits are held at once: chunk_tokens * shard.valid numbers of float32.

    Logits and all sums are float32 (float64 for float64 inputs), whatever the dtype of the inputs. Communicated is one
    all-gather a chunk, of four numbers a token. The gradient of `hidden_LH` is this rank's part, the sum over its own
    columns: whoever made `hidden_LH` the same on all ranks sums it over the group. The gradients are held until the
    backward pass, which scales them in place and hands them over, once. They are not saved through autograd, so
    checkpointing around the head neither drops nor recomputes them.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    check_products(hidden_LH, weight_VH, streams.targets_L, terms.temperature, shard, chunk_tokens)
    check_objective(hidden_LH, streams, terms)
    needs = (torch.is_grad_enabled() and hidden_LH.requires_grad, torch.is_grad_enabled() and weight_VH.requires_grad)
    return HeadOutput(*_Head.apply(hidden_LH, weight_VH, streams, terms, shard, chunk_tokens, needs))


@torch.no_grad()
def score_head(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    targets_L: Tensor,
    temperature: float,
    shard: VocabShard,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, [L] each, without gradients: the same code as `policy_head`'s first half.

    Arguments, dtypes, communication and errors are as in `policy_head`.
    """
    check_products(hidden_LH, weight_VH, targets_L, temperature, shard, chunk_tokens)
    head = _Chunks(hidden_LH, weight_VH, temperature, shard, chunk_tokens)
    rows = [head.softmax(tokens, targets_L) for tokens in head.spans()]
    empty_L = hidden_LH.new_empty(0, dtype=head.dtype)
    return torch.cat([empty_L, *(r.logprobs_C for r in rows)]), torch.cat([empty_L, *(r.entropy_C for r in rows)])


class _Chunks:
    """One buffer of [chunk, columns] in the computing dtype, and the products of the head around it."""

    def __init__(self, hidden_LH: Tensor, weight_VH: Tensor, temperature: float, shard: VocabShard, chunk: int) -> None:
        self.hidden_LH, self.weight_VH = hidden_LH.detach(), weight_VH.detach()[: shard.valid]
        self.inverse_temperature, self.shard, self.chunk = 1.0 / temperature, shard, chunk
        self.dtype = torch.float64 if hidden_LH.dtype == torch.float64 else torch.float32
        rows = min(chunk, hidden_LH.shape[0])
        self.buffer_CV = hidden_LH.new_empty(rows, shard.valid, dtype=self.dtype)

    def spans(self) -> Iterator[slice]:
        tokens = self.hidden_LH.shape[0]
        return (slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk))

    def _weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of the buffer and the rows of the weight that they come from, in the computing dtype."""
        rows = self.weight_VH.shape[0]
        for start in range(0, rows, BLOCK_ROWS):
            columns = slice(start, min(start + BLOCK_ROWS, rows))
            yield columns, self.weight_VH[columns].to(self.dtype)

    def softmax(self, tokens: slice, targets_L: Tensor) -> RowSoftmax:
        """Fills the buffer with the exponentials of the chunk's logits and returns their statistics."""
        hidden_CH = self.hidden_LH[tokens].to(self.dtype)
        logits_CV = self.buffer_CV[: hidden_CH.shape[0]]
        for columns, block_VH in self._weight_blocks():
            out = logits_CV[:, columns]
            torch.addmm(out, hidden_CH, block_VH.T, beta=0, alpha=self.inverse_temperature, out=out)
        return row_softmax_(logits_CV, targets_L[tokens], self.shard)

    def backward(self, tokens: slice, targets_L: Tensor, rows: RowSoftmax, slopes: _Slopes, grads: _Gradients) -> None:
        """Adds the chunk's gradients to `grads`, using up the exponentials in the buffer."""
        exp_CV = self.buffer_CV[: rows.shift_C.shape[0]]
        hidden_CH = self.hidden_LH[tokens].to(self.dtype)
        silent_C1 = slopes.silent_C[:, None]
        scale_C = (rows.shift_C - rows.log_sum_C).exp() * self.inverse_temperature
        if slopes.entropy_C is None:
            scale_C = -slopes.logprob_C * scale_C
        else:
            _add_entropy_gradient_(exp_CV, rows, slopes.logprob_C, slopes.entropy_C)
        # Exponentials of a token that must not count may be NaN, and 0 * NaN would spread over the whole weight.
        spoiled_C = slopes.silent_C & ~(rows.logprobs_C + rows.entropy_C).isfinite()
        exp_CV.index_fill_(0, spoiled_C.nonzero()[:, 0], 0.0)
        local_C = targets_L[tokens] - self.shard.start
        owned_C = (local_C >= 0) & (local_C < self.shard.valid) & ~slopes.silent_C
        pull_C1 = (slopes.logprob_C * self.inverse_temperature)[owned_C, None]
        scaled_CH = (hidden_CH * scale_C[:, None]).masked_fill_(silent_C1, 0.0)
        grad_CH = torch.zeros_like(hidden_CH)
        for columns, block_VH in self._weight_blocks():  # both products while the block of exponentials is in the cache
            if grads.hidden_LH is not None:
                grad_CH.addmm_(exp_CV[:, columns], block_VH)
            if grads.weight_VH is not None:
                grads.weight_VH[columns].addmm_(exp_CV[:, columns].T, scaled_CH, beta=0 if tokens.start == 0 else 1)
        if grads.hidden_LH is not None:
            grad_CH = (grad_CH * scale_C[:, None]).masked_fill_(silent_C1, 0.0)
            grad_CH[owned_C] += pull_C1 * self.weight_VH[local_C[owned_C]].to(self.dtype)
            grads.hidden_LH[tokens] = grad_CH
        if grads.weight_VH is not None:
            grads.weight_VH.index_add_(0, local_C[owned_C], pull_C1 * hidden_CH[owned_C])


@dataclass(frozen=True)
class _Slopes:
    """Derivatives of a chunk's loss with respect to log-prob and entropy."""

    logprob_C: Tensor
    entropy_C: Tensor | None
    """None where the objective has no entropy term."""
    silent_C: Tensor
    """bool: coefficient 0."""


@dataclass
class _Gradients:
    """Gradients being filled: hidden states in their own dtype, the weight in the computing one; None if not wanted."""

    hidden_LH: Tensor | None
    weight_VH: Tensor | None


def _add_entropy_gradient_(exp_CV: Tensor, rows: RowSoftmax, logprob_slope_C: Tensor, entropy_slope_C: Tensor) -> None:
    """Turns e into -g e + b e (log p + H), with log p = (z - m) + shift - log S and e (z - m) = e log e, 0 at e = 0."""
    b_C = -entropy_slope_C
    shift_C = torch.where(rows.shift_C == -torch.inf, 0.0, rows.shift_C)
    linear_C = b_C * (shift_C - rows.log_sum_C + rows.entropy_C) - logprob_slope_C
    for span, tile, scratch in row_tiles(exp_CV):
        torch.special.entr(tile, out=scratch)
        tile.mul_(linear_C[span, None]).sub_(scratch.mul_(b_C[span, None]))


def _objective_and_slopes(rows: RowSoftmax, streams: Streams, terms: Terms) -> tuple[TokenObjective, _Slopes]:
    silent_C = streams.coefficients_L == 0
    with torch.enable_grad():
        logprobs_C, entropy_C = rows.logprobs_C.requires_grad_(), rows.entropy_C.requires_grad_()
        objective = token_objective(logprobs_C, entropy_C, streams, terms)
        wanted = (logprobs_C, entropy_C) if terms.entropy_coef != 0 else (logprobs_C,)
        slopes = torch.autograd.grad(objective.loss_L.sum(), wanted)
    return objective, _Slopes(slopes[0], slopes[1] if len(slopes) == 2 else None, silent_C)


class _Head(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        streams: Streams,
        terms: Terms,
        shard: VocabShard,
        chunk_tokens: int,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:
        head = _Chunks(hidden_LH, weight_VH, terms.temperature, shard, chunk_tokens)
        grads = _Gradients(torch.empty_like(hidden_LH) if needs[0] else None, None)
        if needs[1]:
            grads.weight_VH = torch.empty_like(weight_VH, dtype=head.dtype)
            # The first chunk overwrites the rows that it reaches; the rest are padding, or all of them without tokens.
            grads.weight_VH[shard.valid if hidden_LH.shape[0] else 0 :] = 0.0
        outputs = _empty_outputs(hidden_LH.shape[0], hidden_LH.new_empty(0, dtype=head.dtype))
        for tokens in head.spans():
            rows = head.softmax(tokens, streams.targets_L)
            part = streams.slice(tokens)
            objective, slopes = _objective_and_slopes(rows, part, terms)
            if any(needs):
                head.backward(tokens, streams.targets_L, rows, slopes, grads)
            _store(outputs, tokens, rows, objective)
        loss_L, non_finite_L, *rest = outputs
        non_finite = (non_finite_L & (streams.coefficients_L != 0)).sum()
        ctx.grads = grads
        ctx.mark_non_differentiable(*rest, non_finite)
        return loss_L.sum(), *rest, non_finite

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("policy_head's gradients went to an earlier backward pass: call it again")
        grads: _Gradients = ctx.grads
        # Letting go of them lets autograd adopt the tensors instead of copying them.
        ctx.grads = None
        grad_hidden = None if grads.hidden_LH is None else grads.hidden_LH.mul_(grad_loss.to(grads.hidden_LH.dtype))
        grad_weight = None if grads.weight_VH is None else grads.weight_VH.mul_(grad_loss)
        return grad_hidden, grad_weight, None, None, None, None, None


def _empty_outputs(tokens: int, like: Tensor) -> tuple[Tensor, ...]:
    """loss, non-finite, log-prob, entropy, ratio, calibration weight, clipped low, clipped high: [L] each."""
    floats = [like.new_empty(tokens) for _ in range(5)]
    flags = [like.new_empty(tokens, dtype=torch.bool) for _ in range(3)]
    return floats[0], flags[0], *floats[1:], *flags[1:]


def _store(outputs: tuple[Tensor, ...], tokens: slice, rows: RowSoftmax, objective: TokenObjective) -> None:
    finite_C = (rows.logprobs_C + rows.entropy_C + objective.loss_L).isfinite()
    values = (objective.loss_L, ~finite_C, rows.logprobs_C, rows.entropy_C, objective.ratio_L)
    masks = (objective.calibration_weight_L, objective.clipped_low_L, objective.clipped_high_L)
    for output_L, value_C in zip(outputs, (*values, *masks), strict=True):
        output_L[tokens] = value_C.detach()
