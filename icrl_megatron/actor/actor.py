"""The actor: a Megatron model that scores and trains packed plans, independently of the kind of critic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icrl_kernels import HeadOutput, Terms
from icrl_megatron.actor.measure import Totals, measure, measure_mismatch, token_weights
from icrl_megatron.actor.offload import Offload
from icrl_megatron.actor.optimizer import Optimizer, wrap
from icrl_megatron.actor.passes import Frozen, HeadPlan, head_shard, score_pass, train_pass
from icrl_megatron.actor.plain_loss import PlainLoss
from icrl_megatron.algo import losses
from icrl_megatron.data.context import share
from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.model.gpt import build
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.model.weights import load_hf, rows
from icrl_megatron.settings.schema import Settings
from icrl_megatron.types import MicroBatch, StepPlan, StepStats

RATIO_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Allowed |ratio - 1| between a scoring and a training pass with the same weights, by precision."""
ScoredPlan = tuple[tuple[Frozen, ...], ...]
"""[update][micro-batch], parallel to `StepPlan.updates`; of whole micro-batches on every context-parallel rank."""


class InvariantError(RuntimeError):
    """A quantity with a known value has another value: the run must stop."""


class Actor:
    """One rank's part of the model and its optimizer. All ranks call the same methods in the same order."""

    def __init__(self, settings: Settings, folder: Path, grid: Grid, weights: bool = True) -> None:
        """Builds the model and loads `folder` (a Hugging Face model; only its configuration if `weights` is False).

        Raises ConfigError on a bad folder.
        """
        self.settings, self.grid = settings, grid
        self.shape = ModelShape.read(folder)
        self.model = build(self.shape, settings.actor, grid)
        self.rows = rows(self.model, self.shape, grid)
        if weights:
            load_hf(self.rows, folder, self.shape)
        self.reference = self._frozen_copy(folder) if settings.algo.kl_coef > 0 else None
        self.wrapped = wrap(self.model)
        self.optimizer = Optimizer(self.wrapped, settings.actor, settings.optim)
        self.offload = Offload(settings.actor.offload, self.optimizer, self.wrapped)
        self.head = HeadPlan(
            terms=_terms(settings),
            shard=head_shard(self.shape, grid),
            chunking=platform.head_chunking(settings.actor),
            mismatch_cap=settings.algo.mismatch_correction.cap if settings.algo.mismatch_correction.enabled else None,
            loss=None if settings.algo.fused() else PlainLoss(losses.named(settings.algo.loss), settings.algo),
        )

    def score(self, plan: StepPlan, behaviour: StepPlan | None = None) -> ScoredPlan:
        """Frozen log-probs for a plan: of the old policy, of the behavior prompts (`behaviour`, packed like `plan`) and
        of the reference model, each only if it is needed.

        With one update per step the training pass itself is the old policy, and a scoring pass would give the same
        numbers. This is verified once per run, before its first update, where the ratio must be 1.
        """
        algo = self.settings.algo
        needs_old = len(plan.updates) > 1 or algo.mismatch_correction.enabled or self.optimizer.steps == 0
        old = self._score(self.wrapped, plan) if needs_old else None
        behind = self._score(self.wrapped, behaviour) if behaviour is not None else None
        reference = self._score(self.reference, plan) if self.reference is not None else None
        passes = (old, behind, reference)

        def of(u: int, m: int) -> Frozen:
            # Only the last stage has scores.
            return Frozen(*[None if scores is None or not scores[u] else scores[u][m] for scores in passes])

        return tuple(tuple(of(u, m) for m in range(len(update))) for u, update in enumerate(plan.updates))

    def nll(self, plan: StepPlan) -> float:
        """Mean -log-prob of a plan's loss tokens under the current weights, over all replicas; the same on every
        rank."""
        totals = Totals()
        for scores in self._score(self.wrapped, plan):
            for logprobs_L in scores if self.grid.reports else ():  # only the last stage has any
                totals.add({"nll": -float(logprobs_L.double().sum()), "tokens": len(logprobs_L)})
        totals.reduce(self.grid)
        return totals.sums["nll"] / totals.sums["tokens"]

    def mismatch(self, plan: StepPlan) -> Totals:
        """The sums of `actor/mismatch_*` over a plan's loss tokens that the current weights generated; over all
        replicas, the same on every rank. Nothing is trained on them."""
        totals = Totals()
        for update, scores in zip(plan.updates, self._score(self.wrapped, plan), strict=True):
            for batch, logprobs_L in zip(update, scores, strict=True) if scores and self.grid.reports else ():
                totals.add(measure_mismatch(batch, logprobs_L))
        totals.reduce(self.grid)
        return totals

    def train(
        self, plan: StepPlan, scored: ScoredPlan, learning_rate: float, probed: Totals | None = None
    ) -> StepStats:
        """Applies the plan's updates. `probed` is added to the statistics: what `mismatch` found outside of the plan.
        Raises InvariantError if the first update of the run does not see ratio 1."""
        totals = Totals()
        weights: dict[str, tuple[float, ...]] = {}

        def measuring(batch: MicroBatch, frozen: Frozen, out: HeadOutput) -> dict[str, float]:
            weights.update(token_weights(plan.samples, batch, out))
            return measure(self.head.terms.w_max, batch, frozen, out)

        norms: list[float] = []
        skipped = 0
        for number, (update, frozen) in enumerate(zip(plan.updates, scored, strict=True)):
            self.wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            of_scoring, of_update = Totals(), Totals()
            of_scoring.add({"non_finite": _non_finite(frozen)} if self.grid.reports else {})
            of_scoring.reduce(self.grid)
            if of_scoring.sums["non_finite"] > 0:
                # The scored policy is already broken: its training pass would be refused.
                totals.merge(of_scoring)
                skipped += 1
                continue
            shares = self._shares(update)
            of_shares = [(batch, of.of(batch)) for batch, of in zip(shares, frozen, strict=True)]
            for measured in train_pass(self.wrapped, self.head, of_shares, measuring):
                of_update.add(measured if self.grid.tensor_rank == 0 else {})
            of_update.reduce(self.grid)
            if number == 0:
                self._check_first_step(of_update)
            done = self.optimizer.step(learning_rate, healthy=of_update.sums.get("non_finite", 0.0) == 0)
            skipped += not done.applied
            norms.append(done.grad_norm)
            totals.merge(of_update)
        if probed is not None:
            totals.merge(probed)
        tokens = sum(int(b.cu_seqlens[-1]) for update in plan.updates for b in update)
        return StepStats(
            loss=totals.sums.get("loss", 0.0),
            grad_norm=max(norms, default=math.nan),
            learning_rate=learning_rate,
            skipped_updates=skipped,
            loss_tokens=plan.global_loss_tokens,
            tokens=tokens * self.grid.data,
            calibration_weights=weights,
            metrics=totals.means(),
        )

    def _score(self, model: Any, plan: StepPlan) -> list[list[Tensor]]:
        return [score_pass(model, self.head, self._shares(update)) for update in plan.updates]

    def _shares(self, update: Sequence[MicroBatch]) -> list[MicroBatch]:
        """What this rank computes of each micro-batch of its replica."""
        return [share(batch, self.grid.context, self.grid.context_rank) for batch in update]

    def _frozen_copy(self, folder: Path) -> Any:
        model = build(self.shape, self.settings.actor, self.grid).requires_grad_(False)
        load_hf(rows(model, self.shape, self.grid), folder, self.shape)
        return model

    def _check_first_step(self, measured: Totals) -> None:
        """The first update was scored with the same weights, so ratio must be 1 and KL 0, up to rounding."""
        if self.optimizer.steps > 0:
            return
        tolerance = RATIO_TOLERANCE[self.settings.actor.precision]
        deviation = measured.maxima.get("ratio_deviation", 0.0)
        if not deviation <= tolerance:
            raise InvariantError(
                f"first step: a ratio of the unchanged policy deviates from 1 by {deviation:.2e} (allowed "
                f"{tolerance:.0e}); the scoring and the training pass do not compute the same model"
            )


def _non_finite(frozen: tuple[Frozen, ...]) -> int:
    """Tokens of an update with a frozen log-prob that is not finite."""
    count = 0
    for of_batch in frozen:
        streams = [s for s in (of_batch.old_L, of_batch.behaviour_L, of_batch.reference_L) if s is not None]
        if streams:
            count += int((~torch.stack(streams).isfinite()).any(dim=0).sum())
    return count


def _terms(settings: Settings) -> Terms:
    algo = settings.algo
    return Terms(
        temperature=settings.rollout.temperature,
        clip_low=algo.clip_low,
        clip_high=algo.clip_high,
        w_max=algo.calibration.w_max,
        kl_coef=algo.kl_coef,
        entropy_coef=algo.entropy_coef,
        shaping_gamma=algo.shaping_gamma,
    )
