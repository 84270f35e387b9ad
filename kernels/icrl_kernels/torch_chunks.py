"""The head in torch, for CPUs: few large operations over a reused buffer of [chunk, columns].

With e = exp(z - m) in the buffer, q = exp(m - M) / S and the derivatives g = dloss/dlogprob and b = -dloss/dentropy:

    dloss/dz_v = g (1[v = target] - p_v) + b p_v (log p_v + H)        p_v = q e_v

The row factor and the 1[v = target] term are applied outside the buffer, to the [C, H] sides of the two products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from icrl_kernels.chunking import Gradients, Slopes, TokenOutputs
from icrl_kernels.objective import Streams, Terms, TokenObjective, token_objective
from icrl_kernels.vocabulary import RowSoftmax, VocabShard, row_softmax_, row_tiles

CHUNK_ELEMENTS = 128 * 151936
"""Logits that exist at one time, if the caller gives no number of tokens."""
BLOCK_ROWS = 8192
"""Weight rows per product; half-precision rows are converted before it."""


class TorchChunks:
    """A buffer of [chunk, columns] in the computing dtype, with the products of the head."""

    def __init__(
        self, hidden_LH: Tensor, weight_VH: Tensor, temperature: float, shard: VocabShard, tokens: int | None
    ) -> None:
        self.hidden_LH, self.weight_VH = hidden_LH.detach(), weight_VH.detach()[: shard.valid]
        self.inverse_temperature, self.shard, self.tokens = (
            1.0 / temperature,
            shard,
            # Based on all rows including padding, which are equal on every rank: ranks must use the same chunks.
            tokens or max(1, CHUNK_ELEMENTS // max(1, weight_VH.shape[0])),
        )
        self.dtype = torch.float64 if hidden_LH.dtype == torch.float64 else torch.float32
        rows = min(self.tokens, hidden_LH.shape[0])
        self.buffer_CV = hidden_LH.new_empty(rows, shard.valid, dtype=self.dtype)

    def score(self, span: slice, targets_C: Tensor, logprobs_C: Tensor, entropy_C: Tensor) -> None:
        """See `chunking.Chunks`."""
        rows = self._softmax(span, targets_C)
        logprobs_C.copy_(rows.logprobs_C)
        entropy_C.copy_(rows.entropy_C)

    def train(self, span: slice, streams: Streams, terms: Terms, outputs: TokenOutputs, grads: Gradients) -> None:
        """See `chunking.Chunks`."""
        rows = self._softmax(span, streams.targets_L)
        objective, slopes = _objective_and_slopes(rows, streams, terms)
        if grads.hidden_LH is not None or grads.weight_VH is not None:
            self._backward(span, streams.targets_L, rows, slopes, grads)
        outputs.loss_L[span] = objective.loss_L.detach()
        outputs.logprobs_L[span] = rows.logprobs_C.detach()
        outputs.entropy_L[span] = rows.entropy_C.detach()
        outputs.ratio_L[span] = objective.ratio_L
        outputs.calibration_weight_L[span] = objective.calibration_weight_L
        outputs.clipped_low_L[span] = objective.clipped_low_L
        outputs.clipped_high_L[span] = objective.clipped_high_L
        outputs.finite_L[span] = (rows.logprobs_C + rows.entropy_C + objective.loss_L).isfinite()

    def backward(self, span: slice, targets_C: Tensor, slopes: Slopes, grads: Gradients) -> None:
        """See `chunking.Chunks`."""
        rows = self._softmax(span, targets_C)
        if slopes.entropy_C is None:
            self._backward(span, targets_C, rows, slopes, grads)
        else:
            silent_C, entropy_C = slopes.silent_C, slopes.entropy_C
            finite = Slopes(slopes.logprob_C, entropy_C.masked_fill(silent_C, 0.0), silent_C)
            self._backward(span, targets_C, rows, finite, grads)

    def _weight_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields columns of the buffer with the corresponding weight rows, in the computing dtype."""
        rows = self.weight_VH.shape[0]
        for start in range(0, rows, BLOCK_ROWS):
            columns = slice(start, min(start + BLOCK_ROWS, rows))
            yield columns, self.weight_VH[columns].to(self.dtype)

    def _softmax(self, span: slice, targets_C: Tensor) -> RowSoftmax:
        """Fills the buffer with the exponentials of the chunk's logits and returns their statistics."""
        hidden_CH = self.hidden_LH[span].to(self.dtype)
        logits_CV = self.buffer_CV[: hidden_CH.shape[0]]
        for columns, block_VH in self._weight_blocks():
            out = logits_CV[:, columns]
            torch.addmm(out, hidden_CH, block_VH.T, beta=0, alpha=self.inverse_temperature, out=out)
        return row_softmax_(logits_CV, targets_C, self.shard)

    def _backward(self, span: slice, targets_C: Tensor, rows: RowSoftmax, slopes: Slopes, grads: Gradients) -> None:
        """Adds the chunk's gradients to `grads`; overwrites the exponentials in the buffer."""
        exp_CV = self.buffer_CV[: rows.shift_C.shape[0]]
        hidden_CH = self.hidden_LH[span].to(self.dtype)
        silent_C1 = slopes.silent_C[:, None]
        scale_C = (rows.shift_C - rows.log_sum_C).exp() * self.inverse_temperature
        if slopes.entropy_C is None:
            scale_C = -slopes.logprob_C * scale_C
        else:
            _add_entropy_gradient_(exp_CV, rows, slopes.logprob_C, slopes.entropy_C)
        # Exponentials of a silent token may be NaN, and 0 * NaN would spread over the whole weight gradient.
        spoiled_C = slopes.silent_C & ~(rows.logprobs_C + rows.entropy_C).isfinite()
        exp_CV.index_fill_(0, spoiled_C.nonzero()[:, 0], 0.0)
        local_C = targets_C - self.shard.start
        owned_C = (local_C >= 0) & (local_C < self.shard.valid) & ~slopes.silent_C
        pull_C1 = (slopes.logprob_C * self.inverse_temperature)[owned_C, None]
        scaled_CH = (hidden_CH * (grads.weight_scale * scale_C)[:, None]).masked_fill_(silent_C1, 0.0)
        grad_CH = torch.zeros_like(hidden_CH)
        for columns, block_VH in self._weight_blocks():  # both products while the block of exponentials is cached
            if grads.hidden_LH is not None:
                grad_CH.addmm_(exp_CV[:, columns], block_VH)
            if grads.weight_VH is not None:
                grads.weight_VH[columns].addmm_(exp_CV[:, columns].T, scaled_CH)
        if grads.hidden_LH is not None:
            grad_CH = (grad_CH * scale_C[:, None]).masked_fill_(silent_C1, 0.0)
            grad_CH[owned_C] += pull_C1 * self.weight_VH[local_C[owned_C]].to(self.dtype)
            grads.hidden_LH[span] = grad_CH
        if grads.weight_VH is not None:
            grads.weight_VH.index_add_(0, local_C[owned_C], pull_C1 * hidden_CH[owned_C], alpha=grads.weight_scale)


def _objective_and_slopes(rows: RowSoftmax, streams: Streams, terms: Terms) -> tuple[TokenObjective, Slopes]:
    # This graph ends here. Otherwise the hooks of an activation checkpoint would treat its tensors as the model's and
    # recompute all earlier chunks to restore them.
    with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
        logprobs_C, entropy_C = rows.logprobs_C.requires_grad_(), rows.entropy_C.requires_grad_()
        objective = token_objective(logprobs_C, entropy_C, streams, terms)
        wanted = (logprobs_C, entropy_C) if terms.entropy_coef != 0 else (logprobs_C,)
        slopes = torch.autograd.grad(objective.loss_L.sum(), wanted)
    silent_C = streams.coefficients_L == 0
    return objective, Slopes(slopes[0], slopes[1] if len(slopes) == 2 else None, silent_C)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _add_entropy_gradient_(exp_CV: Tensor, rows: RowSoftmax, logprob_slope_C: Tensor, entropy_slope_C: Tensor) -> None:
    """Replaces e by -g e + b e (log p + H), with log p = (z - m) + shift - log S and e (z - m) = e log e, 0 at e =
    0."""
    b_C = -entropy_slope_C
    shift_C = torch.where(rows.shift_C == -torch.inf, 0.0, rows.shift_C)
    linear_C = b_C * (shift_C - rows.log_sum_C + rows.entropy_C) - logprob_slope_C
    for span, tile, scratch in row_tiles(exp_CV):
        torch.special.entr(tile, out=scratch)
        tile.mul_(linear_C[span, None]).sub_(scratch.mul_(b_C[span, None]))
