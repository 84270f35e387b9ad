"""Computes a loss given as a plain function (`algo.losses`) for one micro-batch, with the recomputing log-prob head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from icrl_kernels import Chunking, HeadOutput, MainGrad, Streams, VocabShard, logprob_head
from icrl_megatron.algo.losses import Loss, LossInputs, PolicyTerm, kl_L
from icrl_megatron.data.context import BatchShare
from icrl_megatron.model.context import gather_whole
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.types import MicroBatch

_Fill = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PlainLoss:
    """A loss function and the settings it reads."""

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
        """Returns the same as `icrl_kernels.policy_head`, for this loss. The fused head gets the same `streams`."""
        logprobs_L, entropy_L = logprob_head(
            hidden_LH, weight_VH, streams.targets_L, temperature, shard, chunking, main_grad
        )
        uncounted_L = streams.coefficients_L == 0

        def fill(values_L: Tensor) -> Tensor:
            # Zero before any arithmetic: a zero gradient times an infinite derivative would be NaN.
            return values_L.to(logprobs_L.dtype).masked_fill(uncounted_L, 0.0)

        inputs = _inputs(fill, logprobs_L, entropy_L, batch, streams)
        term, weight_L = self._term(inputs, batch), self._weight_L(inputs, streams)
        loss_L = weight_L * term.loss_L
        if self.algo.kl_coef != 0 and streams.reference_logprobs_L is not None:
            reference_L = fill(streams.reference_logprobs_L)
            loss_L = loss_L + self.algo.kl_coef * kl_L(self.algo.kl_estimator, inputs.logprobs_L, reference_L)
        if self.algo.entropy_coef != 0:
            loss_L = loss_L - self.algo.entropy_coef * inputs.entropy_L
        loss_L = fill(streams.coefficients_L) * loss_L
        return _output(loss_L, logprobs_L.detach(), entropy_L.detach(), inputs, term, weight_L)

    def _term(self, inputs: LossInputs, batch: MicroBatch) -> PolicyTerm:
        """The loss function's result for these tokens. Under context parallelism it gets all of the micro-batch, so
        that it sees whole sequences; what it returns for other ranks' tokens counts there."""
        if not isinstance(batch, BatchShare):
            return self.function(inputs, self.algo)
        names = [f.name for f in fields(inputs) if f.name.endswith("_L") and f.name != "sequence_L"]
        columns = torch.stack([getattr(inputs, name).to(inputs.logprobs_L.dtype) for name in names], dim=1)
        whole = dict(zip(names, gather_whole(columns, batch.loss).unbind(1), strict=True))
        sequence_L, sequences = _sequences(batch.whole)
        whole |= {"mask_L": whole["mask_L"] != 0, "sequence_L": sequence_L.to(columns.device)}
        frozen = {n: v if n in ("logprobs_L", "entropy_L") else v.detach() for n, v in whole.items()}
        term = self.function(LossInputs(**frozen, sequences=sequences), self.algo)
        own = torch.from_numpy(batch.loss.own).to(columns.device)
        flags = (term.loss_L[own], term.clipped_low_L[own], term.clipped_high_L[own])
        return PolicyTerm(*flags, {name: values_L[own] for name, values_L in term.metrics.items()})

    def _weight_L(self, inputs: LossInputs, streams: Streams) -> Tensor:
        """w_t = min(pi_old(y|q) / pi(y|q,c), w_max) on calibrated tokens, 1 elsewhere; no gradient."""
        ones_L = torch.ones_like(inputs.old_L)
        if streams.calibrated_L is None:
            return ones_L
        proposed_L = (inputs.old_L - inputs.behaviour_L).exp().clamp(max=self.algo.calibration.w_max)
        return torch.where(streams.calibrated_L & inputs.mask_L, proposed_L, ones_L)


def _inputs(fill: _Fill, logprobs_L: Tensor, entropy_L: Tensor, batch: MicroBatch, streams: Streams) -> LossInputs:
    current_L = fill(logprobs_L)
    sequence_L, sequences = _sequences(batch)
    engine_L = fill(torch.from_numpy(batch.rollout_logprobs_L).to(current_L.device))
    behaviour_L = streams.behaviour_logprobs_L
    return LossInputs(
        logprobs_L=current_L,
        entropy_L=fill(entropy_L),
        old_L=current_L.detach() if streams.old_logprobs_L is None else fill(streams.old_logprobs_L),
        behaviour_L=engine_L if behaviour_L is None else fill(behaviour_L),
        engine_L=engine_L,
        advantages_L=fill(streams.advantages_L),
        mask_L=streams.coefficients_L != 0,
        sequence_L=sequence_L.to(current_L.device),
        sequences=sequences,
    )


def _sequences(batch: MicroBatch) -> tuple[Tensor, int]:
    """The sequence of each loss token, and their number."""
    samples, sequence_L = np.unique(batch.sample_index_L, return_inverse=True)
    return torch.from_numpy(sequence_L.astype(np.int64)), len(samples)


def _output(
    loss_L: Tensor, logprobs_L: Tensor, entropy_L: Tensor, inputs: LossInputs, term: PolicyTerm, weight_L: Tensor
) -> HeadOutput:
    finite_L = (logprobs_L + entropy_L + loss_L.detach()).isfinite()
    return HeadOutput(
        loss=loss_L.sum(),
        logprobs_L=logprobs_L,
        entropy_L=entropy_L,
        ratio_L=inputs.log_ratio_L().detach().exp(),
        calibration_weight_L=weight_L,
        clipped_low_L=term.clipped_low_L,
        clipped_high_L=term.clipped_high_L,
        non_finite=(~finite_L & inputs.mask_L).sum(),
        metrics={name: values_L.detach() * inputs.mask_L for name, values_L in term.metrics.items()},
    )
