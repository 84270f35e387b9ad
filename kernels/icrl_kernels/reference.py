"""The head in eager torch: all logits at once, with autograd. The reference for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from icrl_kernels.head import HeadOutput
from icrl_kernels.objective import Streams, Terms, token_objective


def _scores(hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_LV = hidden_LH @ weight_VH.T / temperature
    logprobs_LV = logits_LV.log_softmax(-1)
    entropy_L = -(logprobs_LV.exp() * logprobs_LV).sum(-1)
    return logprobs_LV.gather(1, targets_L[:, None])[:, 0], entropy_L


def reference_head(hidden_LH: Tensor, weight_VH: Tensor, streams: Streams, terms: Terms, vocabulary: int) -> HeadOutput:
    """`policy_head` over a whole vocabulary, computed in the dtype of the inputs.

    Rows of `weight_VH` from `vocabulary` on are padding. Unlike in `policy_head`, coefficients of 0 do not mask
    non-finite logits.
    """
    logprobs_L, entropy_L = _scores(hidden_LH, weight_VH[:vocabulary], streams.targets_L, terms.temperature)
    objective = token_objective(logprobs_L, entropy_L, streams, terms)
    finite_L = (logprobs_L + entropy_L + objective.loss_L).isfinite()
    return HeadOutput(
        loss=objective.loss_L.sum(),
        logprobs_L=logprobs_L.detach(),
        entropy_L=entropy_L.detach(),
        ratio_L=objective.ratio_L,
        calibration_weight_L=objective.calibration_weight_L,
        clipped_low_L=objective.clipped_low_L,
        clipped_high_L=objective.clipped_high_L,
        non_finite=(~finite_L & (streams.coefficients_L != 0)).sum(),
    )


@torch.no_grad()
def reference_scores(
    hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor, temperature: float, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """`score_head` over a whole vocabulary: log-probs and entropies, [L] each."""
    return _scores(hidden_LH, weight_VH[:vocabulary], targets_L, temperature)
