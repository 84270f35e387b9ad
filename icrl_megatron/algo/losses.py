"""Losses as plain functions of log-probs. `algo.loss` chooses one by name, or as "package.module:function".

A loss gets the loss tokens of one packed micro-batch, with whole sequences, and returns the policy term of each token.
The caller multiplies it by the calibration weight w_t, adds the KL and entropy terms, and sums over tokens with the
normaliser c_t of the whole step, so a loss cannot depend on micro-batching, packing or the grid.

To add one: a function with the signature of `Loss`, and its name in `LOSSES` (settings/limits.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from icrl_megatron.settings.limits import LOSSES
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.utils.errors import ConfigError

FUSED = "icrl"
"""The loss that the fused head computes by itself, with k3 as its KL estimator."""


@dataclass(frozen=True)
class LossInputs:
    """The loss tokens of one micro-batch. Tensors are [L], fp32 (fp64 in tests), and finite; a token that does not
    count holds zeros."""

    logprobs_L: Tensor
    """log pi_theta(y|q); the only tensor with a gradient."""
    old_L: Tensor
    """log pi_old(y|q): the policy before this step's first update."""
    behaviour_L: Tensor
    """Log-prob under the prompt that the engine saw: with the critique for revisions."""
    engine_L: Tensor
    """Log-prob that the engine reported when it sampled the token."""
    advantages_L: Tensor
    mask_L: Tensor
    """bool: tokens that count."""
    sequence_L: Tensor
    """int64: the sequence of each token, 0 to `sequences` - 1. A sequence is never split over micro-batches."""
    sequences: int

    def ratio_L(self) -> Tensor:
        """pi_theta / pi_old of each token."""
        return (self.logprobs_L - self.old_L).exp()

    def mean_S(self, values_L: Tensor) -> Tensor:
        """Mean of a value over the counted tokens of each sequence, [sequences]; 0 for a sequence without any."""
        zeros_S = values_L.new_zeros(self.sequences)
        total_S = zeros_S.index_add(0, self.sequence_L, values_L * self.mask_L)
        count_S = zeros_S.index_add(0, self.sequence_L, self.mask_L.to(values_L.dtype))
        return total_S / count_S.clamp(min=1)


@dataclass(frozen=True)
class PolicyTerm:
    """What a loss returns, [L] each."""

    loss_L: Tensor
    """To be minimised; without coefficient, weight, KL and entropy."""
    clipped_low_L: Tensor
    """bool: the advantage is negative and clipping removes the gradient."""
    clipped_high_L: Tensor
    """bool: the same for a positive advantage."""


Loss = Callable[[LossInputs, AlgoSettings], PolicyTerm]


def icrl(inputs: LossInputs, algo: AlgoSettings) -> PolicyTerm:
    """-min(ratio A, clip(ratio) A): PPO's clipped term with two bounds (ICRL Eq. 6)."""
    return _clipped(inputs.ratio_L(), inputs.advantages_L, algo)


def dual_clip(inputs: LossInputs, algo: AlgoSettings) -> PolicyTerm:
    """As `icrl`, and for negative advantages at most `dual_clip` |A| (arXiv 1912.09729, Eq. 5): a token that the policy
    now finds far more likely than before cannot dominate the step."""
    ratio_L, advantages_L = inputs.ratio_L(), inputs.advantages_L
    term = _clipped(ratio_L, advantages_L, algo)
    bounded_L = (advantages_L < 0) & (ratio_L > algo.dual_clip)
    loss_L = torch.where(bounded_L, -algo.dual_clip * advantages_L, term.loss_L)
    return PolicyTerm(loss_L, term.clipped_low_L | bounded_L, term.clipped_high_L)


def gspo(inputs: LossInputs, algo: AlgoSettings) -> PolicyTerm:
    """Sequence-level ratio, the geometric mean of the token ratios (GSPO, arXiv 2507.18071, Eqs. 5 and 7). All tokens
    of a sequence have the same term, so `loss_normalisation=sequence_mean` gives the paper's objective."""
    log_ratio_S = inputs.mean_S(inputs.logprobs_L - inputs.old_L)
    return _clipped(log_ratio_S.exp()[inputs.sequence_L], inputs.advantages_L, algo)


def cispo(inputs: LossInputs, algo: AlgoSettings) -> PolicyTerm:
    """-sg(clip(ratio)) A log pi: the importance weight is clipped, and no token loses its gradient (MiniMax-M1,
    arXiv 2506.13585, Eqs. 4 and 5, which leave the lower bound open: clip_low=1)."""
    ratio_L = inputs.ratio_L().detach()
    weight_L = ratio_L.clamp(1.0 - algo.clip_low, 1.0 + algo.clip_high)
    loss_L = -weight_L * inputs.advantages_L * inputs.logprobs_L
    never_L = torch.zeros_like(inputs.mask_L)
    return PolicyTerm(loss_L, never_L, never_L)


def _clipped(ratio_L: Tensor, advantages_L: Tensor, algo: AlgoSettings) -> PolicyTerm:
    low, high = 1.0 - algo.clip_low, 1.0 + algo.clip_high
    frozen_L = ratio_L.detach()
    clipped_low_L = (advantages_L < 0) & (frozen_L < low)
    clipped_high_L = (advantages_L > 0) & (frozen_L > high)
    # By cases, so that an overflowing ratio whose gradient is clipped away leaves no NaN.
    used_L = torch.where(clipped_low_L | clipped_high_L, frozen_L.clamp(low, high), ratio_L)
    return PolicyTerm(-used_L * advantages_L, clipped_low_L, clipped_high_L)


def kl_L(estimator: str, logprobs_L: Tensor, reference_L: Tensor) -> Tensor:
    """Schulman's estimators of KL(pi_theta || pi_ref) for sampled tokens, [L]: k1 = log r, k2 = (log r)^2 / 2,
    k3 = exp(-log r) - 1 + log r, with log r = log pi_theta - log pi_ref (joschu.net/blog/kl-approx.html)."""
    log_ratio_L = logprobs_L - reference_L
    if estimator == "k1":
        return log_ratio_L
    if estimator == "k2":
        return log_ratio_L.square() / 2
    return torch.expm1(-log_ratio_L) + log_ratio_L


def chosen(algo: AlgoSettings) -> Loss | None:
    """The loss that `algo` asks for; None where the fused head computes it. Raises ConfigError on a name that leads to
    no function."""
    if algo.loss == FUSED and algo.kl_estimator == "k3":
        return None
    return named(algo.loss)


def named(name: str) -> Loss:
    """A loss by its name, or by "package.module:function". Raises ConfigError where there is none."""
    if name in LOSSES:
        found: Loss = globals()[name]
        return found
    module, _, function = name.partition(":")
    try:
        given = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"algo.loss={name}: {error}; choose one of {', '.join(LOSSES)} for a new run, or add the "
            "folder of the module to PYTHONPATH"
        ) from error
    if not callable(given):
        raise ConfigError(f"algo.loss={name}: that is no function; it must take LossInputs and AlgoSettings")
    return given
