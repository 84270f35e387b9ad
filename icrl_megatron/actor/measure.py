"""Statistics of the objective: sums over loss tokens, computed per micro-batch and reduced once per update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from icrl_kernels import HeadOutput
from icrl_megatron.actor.passes import Frozen
from icrl_megatron.data.context import BatchShare
from icrl_megatron.distributed.grid import Grid, gather_objects
from icrl_megatron.model.context import gather_whole
from icrl_megatron.types import MicroBatch, Sample

MAXIMUM = "max/"
_PER = {
    "calibration_weight": "calibrated",
    "calibration_at_max": "calibrated",
    "calibration_under_half": "calibrated",
    "mismatch_abs": "mismatched",
    "mismatch_ratio": "mismatched",
    "drift_abs": "drifted",
}
"""Sums whose mean is over some of the tokens; all others are divided by `tokens`."""
_PLAIN = ("loss", "non_finite", "calibrated", "mismatched", "drifted", "tokens")


def measure(w_max: float, batch: MicroBatch, frozen: Frozen, out: HeadOutput) -> dict[str, float]:
    """Sums (and `max/` maxima) over one micro-batch's loss tokens of all logged statistics of the objective."""
    log_ratio_L = out.ratio_L.log()
    device = out.logprobs_L.device
    calibrated_L = torch.from_numpy(batch.calibrated_L).to(device)
    weight_C = out.calibration_weight_L[calibrated_L]
    rollout_L = torch.from_numpy(batch.rollout_logprobs_L).to(device)
    trainer_L = out.logprobs_L if frozen.old_L is None else frozen.old_L
    same_prompt_L = torch.from_numpy(batch.same_prompt_L).to(device)
    if frozen.behaviour_L is not None:
        trainer_L = torch.where(same_prompt_L, trainer_L, frozen.behaviour_L)
        same_prompt_L = torch.ones_like(same_prompt_L)
    # Tokens of older weights do not measure the engine: their difference is what training changed since.
    stale_L = torch.from_numpy(batch.stale_L).to(device)
    mismatch_M = (trainer_L - rollout_L)[same_prompt_L & ~stale_L]
    numbers: dict[str, torch.Tensor | float] = {
        "loss": out.loss.detach(),
        "tokens": len(batch.targets_L),
        "entropy": out.entropy_L.sum(),
        "nll": -out.logprobs_L.sum(),
        "ratio": out.ratio_L.sum(),
        "kl_old": (out.ratio_L - 1.0 - log_ratio_L).sum(),
        "clip_low": out.clipped_low_L.sum(),
        "clip_high": out.clipped_high_L.sum(),
        "calibrated": len(weight_C),
        "calibration_weight": weight_C.sum(),
        "calibration_at_max": (weight_C >= w_max).sum(),
        "calibration_under_half": (weight_C < 0.5).sum(),
        "max/ratio_deviation": (out.ratio_L - 1.0).abs().amax() if len(out.ratio_L) else 0.0,
        **_mismatch(mismatch_M),
        "non_finite": out.non_finite,
    }
    if batch.stale_L.any():
        drift_D = (trainer_L - rollout_L)[same_prompt_L & stale_L]
        numbers |= {"stale": stale_L.sum(), "drifted": len(drift_D), "drift_abs": drift_D.abs().sum()}
    numbers["kl_reference"] = 0.0
    if frozen.reference_L is not None:
        gap_L = frozen.reference_L - out.logprobs_L
        numbers["kl_reference"] = (torch.expm1(gap_L) - gap_L).sum()
    numbers.update((f"loss_{name}", values_L.sum()) for name, values_L in out.metrics.items())
    return _on_host(numbers)


def measure_mismatch(batch: MicroBatch, trainer_L: torch.Tensor) -> dict[str, float]:
    """The sums of `measure` over the loss tokens that the current weights generated, of how much the engine's log-probs
    differ from `trainer_L`, the actor's under the same prompts."""
    fresh_L = torch.from_numpy(~batch.stale_L).to(trainer_L.device)
    rollout_L = torch.from_numpy(batch.rollout_logprobs_L).to(trainer_L.device)
    return _on_host(_mismatch((trainer_L - rollout_L)[fresh_L]))


def _mismatch(difference_M: torch.Tensor) -> dict[str, torch.Tensor | float]:
    return {
        "mismatched": len(difference_M),
        "mismatch_abs": difference_M.abs().sum(),
        "mismatch_ratio": difference_M.exp().sum(),
        "max/mismatch": difference_M.abs().amax() if len(difference_M) else 0.0,
    }


def _on_host(numbers: dict[str, torch.Tensor | float]) -> dict[str, float]:
    """One copy for all numbers: one copy per number would synchronize each time."""
    tensors = [v.double() for v in numbers.values() if isinstance(v, torch.Tensor)]
    found = iter(torch.stack(tensors).tolist())
    return {name: next(found) if isinstance(value, torch.Tensor) else float(value) for name, value in numbers.items()}


def token_weights(samples: Sequence[Sample], batch: MicroBatch, out: HeadOutput) -> dict[str, tuple[float, ...]]:
    """sample_id -> calibration weight of each loss token, for the calibrated samples of one micro-batch. Collective
    over the context-parallel ranks."""
    weight_L = out.calibration_weight_L.detach()
    if isinstance(batch, BatchShare):
        weight_L, batch = gather_whole(weight_L, batch.loss), batch.whole
    chosen_L = np.flatnonzero(batch.calibrated_L)
    if len(chosen_L) == 0:
        return {}
    weights_L = weight_L.float().cpu().numpy()
    found: dict[str, list[float]] = defaultdict(list)
    for position in chosen_L:
        # Loss tokens of a sample are in their original order.
        found[samples[batch.sample_index_L[position]].sample_id].append(round(float(weights_L[position]), 4))
    return {name: tuple(of) for name, of in found.items()}


class Totals:
    """Sums and maxima by name, over micro-batches, ranks and updates."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = {}

    def add(self, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            if name.startswith(MAXIMUM):
                self._raise(name.removeprefix(MAXIMUM), value)
            else:
                self.sums[name] += value

    def merge(self, other: Totals) -> None:
        for name, value in other.sums.items():
            self.sums[name] += value
        for name, value in other.maxima.items():
            self._raise(name, value)

    def reduce(self, grid: Grid) -> None:
        """Reduces over all ranks. Only last stages have numbers, and of ranks that measured the same tokens only one
        may have added its numbers."""
        everyone: list[Totals] = gather_objects(grid, self)
        self.sums, self.maxima = defaultdict(float), {}
        for other in everyone:
            self.merge(other)

    def means(self) -> dict[str, float]:
        """Token means, maxima as `<name>_max`, and counts; a mean over no tokens is left out."""
        found = {f"{name}_max": value for name, value in self.maxima.items()}
        for name, value in self.sums.items():
            count = self.sums.get(_PER.get(name, "tokens"), 0.0)
            if name in _PLAIN:
                found[name] = value
            elif count > 0:
                found[name] = value / count
        return found

    def _raise(self, name: str, value: float) -> None:
        # Not max(): NaN must win in any position.
        if name not in self.maxima or not value <= self.maxima[name]:
            self.maxima[name] = value
