"""Losses as plain functions of log-probs. `algo.loss` selects one by name, or as "package.module:function".

A loss gets the loss tokens of one packed micro-batch and returns the policy term of each token. The caller multiplies
it by the calibration weight w_t, adds the KL and entropy terms, and sums over tokens with the normalizer c_t of the
whole step. A sequence is never split over micro-batches, and context-parallel ranks gather the values of whole ones, so
a loss that reads only a token's own sequence gives the same gradient on every grid; `loss_check.py` tests that property
of a user's loss before the run starts.

To add one: write a function with the signature of `Loss`, and add its name to `LOSSES` (settings/algo_schema.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from icrl_megatron.settings.algo_schema import LOSSES, AlgoSettings
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class LossInputs:
    """The loss tokens of one micro-batch. Tensors are [L], finite, and fp32 (fp64 in tests). Tokens that do not count
    are zero."""

    logprobs_L: Tensor
    """log pi_theta(y|q). It has a gradient."""
    entropy_L: Tensor
    """Entropy of pi_theta at the token, in nats. It also has a gradient; the other tensors have none."""
    old_L: Tensor
    """log pi_old(y|q): the policy before this step's first update."""
    behaviour_L: Tensor
    """Log-prob under the prompt that the engine saw, which has the critique for revisions."""
    engine_L: Tensor
    """Log-prob that the engine reported when it sampled the token."""
    advantages_L: Tensor
    """Multiplied by the truncated engine mismatch if `algo.mismatch_correction` is on."""
    mask_L: Tensor
    """bool: tokens that count."""
    sequence_L: Tensor
    """int64: the sequence of each token, 0 to `sequences` - 1."""
    sequences: int

    def log_ratio_L(self) -> Tensor:
        """log(pi_theta / pi_old) of each token."""
        return self.logprobs_L - self.old_L

    def sum_S(self, values_L: Tensor) -> Tensor:
        """Sum of a value over the counted tokens of each sequence, [sequences]."""
        # index_add adds in a random order on a GPU, but all ranks of a tensor-parallel group must get the same bits.
        sequence_S1 = torch.arange(self.sequences, device=values_L.device)[:, None]
        return ((sequence_S1 == self.sequence_L) * (values_L * self.mask_L)).sum(1)

    def mean_S(self, values_L: Tensor) -> Tensor:
        """Mean over the counted tokens of each sequence, [sequences]; 0 for a sequence without any."""
        return self.sum_S(values_L) / self.sum_S(torch.ones_like(values_L)).clamp(min=1)


@dataclass(frozen=True)
class PolicyTerm:
    """What a loss returns, [L] each."""

    loss_L: Tensor
    """To be minimized; does not include coefficient, calibration weight, KL and entropy."""
    clipped_low_L: Tensor
    """bool: the advantage is negative, and the lower bound removes the gradient."""
    clipped_high_L: Tensor
    """bool: the advantage is positive, and the upper bound removes the gradient."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Other values per token; their means over all loss tokens of a step are logged as actor/loss_<name>."""


Loss = Callable[[LossInputs, AlgoSettings], PolicyTerm]


def icrl(inputs: LossInputs, algo: AlgoSettings) -> PolicyTerm:
    """-min(ratio A, clip(ratio) A): PPO's clipped term with two bounds (ICRL Eq. 6)."""
    return _clipped(inputs.log_ratio_L(), inputs.advantages_L, algo)


def gspo(inputs: LossInputs, algo: AlgoSettings) -> PolicyTerm:
    """One ratio per sequence, the geometric mean of its tokens' ratios (GSPO, arXiv 2507.18071, Eqs. 5 and 7). All
    tokens of a sequence have the same term, so `loss_normalisation=sequence_mean` gives the paper's objective."""
    log_ratio_L = inputs.mean_S(inputs.log_ratio_L())[inputs.sequence_L]
    term = _clipped(log_ratio_L, inputs.advantages_L, algo)
    return replace(term, metrics={**term.metrics, "sequence_ratio": log_ratio_L.exp()})


def cispo(inputs: LossInputs, algo: AlgoSettings) -> PolicyTerm:
    """-sg(clip(ratio)) A log pi: the importance weight is clipped, and no token loses its gradient (MiniMax-M1,
    arXiv 2506.13585, Eqs. 4 and 5, which leave the lower bound open: clip_low=1)."""
    ratio_L = inputs.log_ratio_L().detach().exp()
    weight_L = ratio_L.clamp(1.0 - algo.clip_low, 1.0 + algo.clip_high)
    loss_L = -weight_L * inputs.advantages_L * inputs.logprobs_L
    never_L = torch.zeros_like(inputs.mask_L)
    return PolicyTerm(loss_L, never_L, never_L, {"clipped_weight": weight_L != ratio_L})


def _clipped(log_ratio_L: Tensor, advantages_L: Tensor, algo: AlgoSettings) -> PolicyTerm:
    """PPO's clipped term. With `algo.dual_clip`, the ratio of a token with a negative advantage is at most that value
    (dual clip, arXiv 1912.09729, Eq. 5), so that a token that became far more likely cannot dominate the step."""
    low, high = 1.0 - algo.clip_low, 1.0 + algo.clip_high
    ratio_L = log_ratio_L.detach().exp()
    clipped_low_L = (advantages_L < 0) & (ratio_L < low)
    clipped_high_L = (advantages_L > 0) & (ratio_L > high)
    clipped_L, bound_L, metrics = clipped_low_L | clipped_high_L, ratio_L.clamp(low, high), {}
    if algo.dual_clip is not None:
        dual_L = (advantages_L < 0) & (ratio_L > algo.dual_clip)
        clipped_L, bound_L = clipped_L | dual_L, torch.where(dual_L, algo.dual_clip, bound_L)
        metrics = {"dual_clip": dual_L}
    # Clipped tokens are masked before exp, because the gradient of an overflowing ratio would be 0 * inf = NaN.
    used_L = torch.where(clipped_L, bound_L, log_ratio_L.masked_fill(clipped_L, 0.0).exp())
    return PolicyTerm(-used_L * advantages_L, clipped_low_L, clipped_high_L, metrics)


def kl_L(estimator: str, logprobs_L: Tensor, reference_L: Tensor) -> Tensor:
    """Schulman's estimators of KL(pi_theta || pi_ref) for sampled tokens, [L]: k1 = log r, k2 = (log r)^2 / 2,
    k3 = exp(-log r) - 1 + log r, with log r = log pi_theta - log pi_ref (joschu.net/blog/kl-approx.html).

    As a loss term, only k2 has the gradient of the KL in expectation on the current policy's own samples; that of k1 is
    0 in expectation.
    """
    log_ratio_L = logprobs_L - reference_L
    if estimator == "k1":
        return log_ratio_L
    if estimator == "k2":
        return log_ratio_L.square() / 2
    return torch.expm1(-log_ratio_L) + log_ratio_L


def named(name: str) -> Loss:
    """A loss by its name, or by "package.module:function". Raises ConfigError if there is none."""
    if name in LOSSES:
        found: Loss = globals()[name]
        return found
    module, _, function = name.partition(":")
    try:
        given = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(
            f"algo.loss={name}: {error}; choose one of {', '.join(LOSSES)} for a new run, or add the "
            "folder of the module to PYTHONPATH"
        ) from error
    if not callable(given):
        raise ConfigError(f"algo.loss={name}: not a function; it must take LossInputs and AlgoSettings")
    return given
