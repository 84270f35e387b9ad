"""A loss that is a plain function (`algo.losses`), computed for one micro-batch over the recomputing log-prob head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icrl_kernels import Chunking, HeadOutput, MainGrad, Streams, VocabShard, logprob_head
from icrl_megatron.algo.losses import Loss, LossInputs, PolicyTerm, kl_L
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.types import MicroBatch

_Live = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PlainLoss:
    """The chosen function and the settings it reads."""

    function: Loss
    algo: AlgoSettings

    def __call__(
        self,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        batch: MicroBatch,
        streams: Streams,
        temperature: float,
        shard: VocabShard,
        chunking: Chunking,
        main_grad: MainGrad | None,
    ) -> HeadOutput:
        """What `icrl_kernels.policy_head` returns, for this loss. `streams` holds what ICRL's objective gets too."""
        logprobs_L, entropy_L = logprob_head(
            hidden_LH, weight_VH, streams.targets_L, temperature, shard, chunking, main_grad
        )
        silent_L = streams.coefficients_L == 0

        def live(values_L: Tensor) -> Tensor:
            # Filled before any arithmetic: a gradient of 0 times an infinite derivative would be NaN.
            return values_L.to(logprobs_L.dtype).masked_fill(silent_L, 0.0)

        inputs = self._inputs(live, logprobs_L, batch, streams)
        term, weight_L = self.function(inputs, self.algo), self._weight_L(live, inputs, streams)
        loss_L = weight_L * term.loss_L
        if self.algo.kl_coef != 0 and streams.reference_logprobs_L is not None:
            reference_L = live(streams.reference_logprobs_L)
            loss_L = loss_L + self.algo.kl_coef * kl_L(self.algo.kl_estimator, inputs.logprobs_L, reference_L)
        if self.algo.entropy_coef != 0:
            loss_L = loss_L - self.algo.entropy_coef * live(entropy_L)
        loss_L = streams.coefficients_L.to(logprobs_L.dtype) * loss_L
        return _output(loss_L, logprobs_L.detach(), entropy_L.detach(), inputs, term, weight_L, silent_L)

    def _inputs(self, live: _Live, logprobs_L: Tensor, batch: MicroBatch, streams: Streams) -> LossInputs:
        current_L = live(logprobs_L)
        _, sequence_L = np.unique(batch.sample_index_L, return_inverse=True)
        rollout_L = torch.from_numpy(batch.rollout_logprobs_L).to(current_L.device)
        behaviour_L = rollout_L if streams.behaviour_logprobs_L is None else streams.behaviour_logprobs_L
        return LossInputs(
            logprobs_L=current_L,
            old_L=current_L.detach() if streams.old_logprobs_L is None else live(streams.old_logprobs_L),
            behaviour_L=live(behaviour_L),
            engine_L=live(rollout_L),
            advantages_L=live(streams.advantages_L),
            mask_L=streams.coefficients_L != 0,
            sequence_L=torch.from_numpy(sequence_L.astype(np.int64).reshape(-1)).to(current_L.device),
            sequences=int(sequence_L.max()) + 1 if sequence_L.size else 0,
        )

    def _weight_L(self, live: _Live, inputs: LossInputs, streams: Streams) -> Tensor:
        """w_t = min(pi_old(y|q) / pi(y|q,c), w_max) on calibrated tokens, 1 elsewhere; without a gradient."""
        ones_L = torch.ones_like(inputs.old_L)
        if streams.calibrated_L is None:
            return ones_L
        proposed_L = (inputs.old_L - inputs.behaviour_L).exp().clamp(max=self.algo.calibration.w_max)
        return torch.where(streams.calibrated_L & inputs.mask_L, proposed_L, ones_L).detach()


def _output(
    loss_L: Tensor,
    logprobs_L: Tensor,
    entropy_L: Tensor,
    inputs: LossInputs,
    term: PolicyTerm,
    weight_L: Tensor,
    silent_L: Tensor,
) -> HeadOutput:
    finite_L = (logprobs_L + entropy_L + loss_L.detach()).isfinite()
    return HeadOutput(
        loss=loss_L.sum(),
        logprobs_L=logprobs_L,
        entropy_L=entropy_L,
        ratio_L=inputs.ratio_L().detach(),
        calibration_weight_L=weight_L,
        clipped_low_L=term.clipped_low_L.detach(),
        clipped_high_L=term.clipped_high_L.detach(),
        non_finite=(~finite_L & ~silent_L).sum(),
    )
