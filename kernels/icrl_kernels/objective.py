"""The objective of ICRL (arXiv 2605.15224, Eq. 6) for one token, given its log-prob and entropy.

    loss_t = c_t * [ -w_t * min(rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t) + kl * k3_t - entropy * H_t ]
    rho_t  = pi_theta(y_t | q) / pi_old(y_t | q)                 both without the critique in the prompt
    w_t    = min(pi_old(y_t | q) / pi(y_t | q, c), w_max)        constant; 1 if the token is not calibrated
    k3_t   = exp(r_t) - r_t - 1,   r_t = log pi_ref(y_t | q) - log pi_theta(y_t | q)

With `shaping_gamma` above 0, calibrated tokens have f(pi_theta) A_t instead of w_t min(...), f(p) = p / (p + gamma):
the policy shaping of Critique-GRPO's refinements (arXiv 2506.03106 and its published code, which use gamma 0.1). Its
gradient f (1 - f) A_t dlogpi is largest for tokens with probability gamma.

This is the only implementation of the loss in torch: the eager reference differentiates it end to end; the chunked head
differentiates it only with respect to log-prob and entropy, and continues with manual derivatives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """The scalars of the objective. The defaults are the plain policy gradient with the paper's clip bounds."""

    temperature: float = 1.0
    """Divides the logits for log-prob, entropy and gradient alike. Greater than 0."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    w_max: float = 2.0
    """Upper bound of the calibration weight."""
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    shaping_gamma: float = 0.0
    """Above 0: calibrated tokens are shaped instead of weighted and clipped."""


@dataclass(frozen=True)
class Streams:
    """Per-token inputs of the objective. All tensors are [L], on one device.

    A positive weight on the policy term only (e.g. a truncated engine mismatch) is multiplied into `advantages_L`.
    """

    targets_L: Tensor
    """int64, ids in the whole vocabulary; any value, such as -100, if the coefficient is 0."""
    coefficients_L: Tensor
    """c_t >= 0, floating: mask and global normalizer. A token with coefficient 0 contributes nothing, whatever its
    other streams or its logits; if its target is outside the vocabulary, its log-prob is reported as -inf."""
    advantages_L: Tensor
    """Floating; 1 everywhere for supervised training."""
    old_logprobs_L: Tensor | None = None
    """log pi_old(y|q). None: this pass is the old policy, so the ratio is 1 with the gradient of the log-prob."""
    behaviour_logprobs_L: Tensor | None = None
    """log pi(y|q, c), the denominator of w_t. Requires `calibrated_L`, and is required by it."""
    calibrated_L: Tensor | None = None
    """bool: tokens with w_t; it is 1 for others."""
    reference_logprobs_L: Tensor | None = None
    """log pi_ref(y|q) of the frozen reference; required if `Terms.kl_coef` is not 0."""

    def slice(self, tokens: slice) -> Streams:
        """Views of the streams for a range of tokens."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: stream[tokens] for name, stream in given.items() if stream is not None})


@dataclass(frozen=True)
class TokenObjective:
    """The objective of each token and values to log. All tensors are [L]; only `loss_L` has a gradient."""

    loss_L: Tensor
    """Includes the coefficient; the loss of the pass is the sum."""
    ratio_L: Tensor
    calibration_weight_L: Tensor
    """w_t; for shaped tokens f(pi_theta), which replaces both w_t and the ratio."""
    clipped_low_L: Tensor
    """bool: advantage < 0 and ratio < 1 - clip_low, so that the policy term has no gradient."""
    clipped_high_L: Tensor
    """bool: advantage > 0 and ratio > 1 + clip_high. At the bound itself the gradient is not clipped."""


def token_objective(logprobs_L: Tensor, entropy_L: Tensor, streams: Streams, terms: Terms) -> TokenObjective:
    """Eq. 6 per token, differentiable in `logprobs_L` and `entropy_L` (float32 or float64, [L]).

    If the coefficient is 0, the loss and its gradients are 0, ratio and weight are reported as 1, and neither NaN nor
    infinity in the inputs propagates.
    """
    dtype = logprobs_L.dtype
    silent_L = streams.coefficients_L == 0

    def live(stream_L: Tensor) -> Tensor:
        # Zero before any arithmetic: a zero gradient times an infinite derivative would be NaN.
        return stream_L.to(dtype).masked_fill(silent_L, 0.0)

    logprobs_L, entropy_L, advantages_L = live(logprobs_L), live(entropy_L), live(streams.advantages_L)
    old_L = logprobs_L.detach() if streams.old_logprobs_L is None else live(streams.old_logprobs_L)
    log_ratio_L = logprobs_L - old_L
    ratio_L = log_ratio_L.detach().exp()
    low, high = 1.0 - terms.clip_low, 1.0 + terms.clip_high
    clipped_low_L = (advantages_L < 0) & (ratio_L < low)
    clipped_high_L = (advantages_L > 0) & (ratio_L > high)
    clipped_L = clipped_low_L | clipped_high_L
    # min(rho A, clip(rho) A) by cases, so that an overflowing ratio with a clipped gradient cannot produce a NaN.
    used_ratio_L = torch.where(clipped_L, ratio_L.clamp(low, high), log_ratio_L.masked_fill(clipped_L, 0.0).exp())
    weight_L = torch.ones_like(ratio_L)
    if streams.calibrated_L is not None and terms.shaping_gamma > 0:
        shaped_L = streams.calibrated_L & ~silent_L
        familiar_L = torch.sigmoid(logprobs_L - math.log(terms.shaping_gamma))  # p / (p + gamma)
        weight_L = torch.where(shaped_L, familiar_L, weight_L)
        used_ratio_L = used_ratio_L.masked_fill(shaped_L, 1.0)
        clipped_low_L, clipped_high_L = clipped_low_L & ~shaped_L, clipped_high_L & ~shaped_L
    elif streams.calibrated_L is not None and streams.behaviour_logprobs_L is not None:
        proposed_L = (old_L - live(streams.behaviour_logprobs_L)).exp().clamp(max=terms.w_max)
        weight_L = torch.where(streams.calibrated_L & ~silent_L, proposed_L, weight_L).detach()
    loss_L = -weight_L * used_ratio_L * advantages_L
    if terms.kl_coef != 0 and streams.reference_logprobs_L is not None:
        gap_L = live(streams.reference_logprobs_L) - logprobs_L
        loss_L = loss_L + terms.kl_coef * (torch.expm1(gap_L) - gap_L)
    if terms.entropy_coef != 0:
        loss_L = loss_L - terms.entropy_coef * entropy_L
    coefficients_L = streams.coefficients_L.to(dtype)
    return TokenObjective(coefficients_L * loss_L, ratio_L, weight_L.detach(), clipped_low_L, clipped_high_L)
