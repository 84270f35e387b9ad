"""A reference trainer: Hugging Face's model, one sequence at a time, full logits, autograd, AdamW.

It shares only the per-token formula (`token_objective`) and the split into updates with the trainer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grid_cases import LEARNING_RATE, STEPS, Case, Layout, Trained
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from whole_samples import Whole

from icrl_kernels import Streams, Terms, TokenObjective, token_objective
from icrl_megatron.data.balance import split_updates
from icrl_megatron.settings.schema import Settings

OTHERS = ("gspo", "cispo")
TOLERANCE = 1e-5
"""Largest difference from the reference, relative to its norm."""


class Reference:
    def __init__(self, case: Case, folder: Path) -> None:
        self.settings: Settings = case.settings(Layout())
        self.samples = sorted(case.draw(Layout()), key=lambda s: s.sample_id)
        self.model, self.start = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
        algo, optim = self.settings.algo, self.settings.optim
        self.weights_L: dict[str, Tensor] = {}
        self.terms = Terms(
            self.settings.rollout.temperature,
            algo.clip_low,
            algo.clip_high,
            algo.calibration.w_max,
            algo.kl_coef,
            algo.entropy_coef,
            algo.shaping_gamma,
        )
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=LEARNING_RATE,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )

    def run(self) -> Trained:
        found = Trained({}, [], [], [], [], {})
        with torch.no_grad():
            found.logprobs = {s.sample_id: self.policy(self.model, s)[0] for s in self.samples}
        for number in range(STEPS):
            self._step(found)
            if number == 0:
                found.token_weights = {name: tuple(of_L.tolist()) for name, of_L in self.weights_L.items()}
        found.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return found

    def _step(self, found: Trained) -> None:
        with torch.no_grad():
            frozen = {s.sample_id: self._streams(s) for s in self.samples}
        losses, norms = [], []
        metrics = {"clip_low": 0.0, "clip_high": 0.0, "calibration_at_max": 0.0, "tokens": 0.0, "calibrated": 0.0}
        if self.settings.algo.dual_clip is not None:
            metrics["loss_dual_clip"] = 0.0
        for places in split_updates([s.sample_id for s in self.samples], self.settings.algo.updates_per_step):
            update = [self.samples[i] for i in places]
            self.model.zero_grad()
            losses.append(sum(self._backward(s, update, frozen[s.sample_id], metrics) for s in update))
            found.gradients.append({n: _grad(p).clone() for n, p in self.model.named_parameters()})
            bound = self.settings.optim.clip_grad or float("inf")
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), bound)))
            self.adam.step()
        for name in metrics.keys() - {"tokens", "calibrated"}:
            metrics[name] /= metrics["calibrated" if name == "calibration_at_max" else "tokens"]
        found.losses.append(sum(losses))
        found.norms.append(max(norms))
        found.metrics.append(metrics)

    def _backward(self, s: Whole, update: list[Whole], streams: Streams, metrics: dict[str, float]) -> float:
        if self.settings.algo.loss_normalisation == "token_mean":
            coefficient = 1.0 / sum(sum(other.loss_mask) for other in update)
        else:
            coefficient = 1.0 / (len(update) * (self.settings.algo.constant_tokens or sum(s.loss_mask)))
        streams.coefficients_L.fill_(coefficient)
        logprobs_L, entropy_L = self.policy(self.model, s)
        if self.settings.algo.loss in OTHERS or self.settings.algo.dual_clip is not None:
            out = self._other(logprobs_L, entropy_L, streams, metrics)
        else:
            out = token_objective(logprobs_L, entropy_L, streams, self.terms)
        out.loss_L.sum().backward()
        if s.calibrated:
            self.weights_L[s.sample_id] = out.calibration_weight_L
        metrics["tokens"] += len(logprobs_L)
        metrics["clip_low"] += float(out.clipped_low_L.sum())
        metrics["clip_high"] += float(out.clipped_high_L.sum())
        metrics["calibrated"] += len(logprobs_L) * s.calibrated
        metrics["calibration_at_max"] += float((out.calibration_weight_L >= self.terms.w_max).sum()) * s.calibrated
        return float(out.loss_L.detach().sum())

    def _other(
        self, logprobs_L: Tensor, entropy_L: Tensor, streams: Streams, metrics: dict[str, float]
    ) -> TokenObjective:
        """The other losses, for one sequence."""
        algo, advantage_L = self.settings.algo, streams.advantages_L
        assert streams.old_logprobs_L is not None and streams.behaviour_logprobs_L is not None
        log_ratio_L = logprobs_L - streams.old_logprobs_L
        ratio_L = (log_ratio_L.mean().expand_as(log_ratio_L) if algo.loss == "gspo" else log_ratio_L).exp()
        low, high = 1 - algo.clip_low, 1 + algo.clip_high
        loss_L = torch.maximum(-ratio_L * advantage_L, -ratio_L.clamp(low, high) * advantage_L)
        if algo.dual_clip is not None:
            loss_L = torch.where(advantage_L < 0, torch.minimum(loss_L, -algo.dual_clip * advantage_L), loss_L)
            metrics["loss_dual_clip"] += float(((advantage_L < 0) & (ratio_L > algo.dual_clip)).sum())
        if algo.loss == "cispo":
            loss_L = -ratio_L.detach().clamp(low, high) * advantage_L * logprobs_L
        weight_L = torch.ones_like(loss_L)
        if streams.calibrated_L is not None and streams.calibrated_L.any():
            weight_L = (streams.old_logprobs_L - streams.behaviour_logprobs_L).exp().clamp(max=self.terms.w_max)
        loss_L = weight_L * loss_L - algo.entropy_coef * entropy_L
        if streams.reference_logprobs_L is not None:
            gap_L = logprobs_L - streams.reference_logprobs_L
            loss_L = loss_L + algo.kl_coef * {"k1": gap_L, "k2": gap_L**2 / 2}[algo.kl_estimator]
        clips = algo.loss != "cispo"
        clipped_low_L = clips & (advantage_L < 0) & (ratio_L < low)
        clipped_high_L = clips & (advantage_L > 0) & (ratio_L > high)
        loss_L = streams.coefficients_L * loss_L
        return TokenObjective(loss_L, ratio_L.detach(), weight_L, clipped_low_L, clipped_high_L)

    def policy(self, model: PreTrainedModel, s: Whole, behaviour: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, [L] each, of the sample's loss tokens after one of its prompts."""
        prompt = s.behaviour_prompt_ids if behaviour else s.train_prompt_ids
        logits_TV = model(torch.tensor([[*prompt, *s.response_ids]])).logits[0] / self.terms.temperature
        mask_R = torch.tensor(s.loss_mask)
        logprobs_LV = logits_TV[len(prompt) - 1 : -1][mask_R].log_softmax(-1)
        targets_L = torch.tensor(s.response_ids)[mask_R]
        return logprobs_LV.gather(1, targets_L[:, None])[:, 0], -(logprobs_LV.exp() * logprobs_LV).sum(-1)

    def _streams(self, s: Whole) -> Streams:
        algo, mask_R = self.settings.algo, torch.tensor(s.loss_mask)
        old_L = self.policy(self.model, s)[0]
        rollout_L = torch.tensor(s.rollout_logprobs)[mask_R]
        recomputed = algo.calibration.denominator == "recomputed"
        behaviour_L = self.policy(self.model, s, behaviour=True)[0]
        advantages_L = torch.full_like(old_L, s.advantage)
        if algo.mismatch_correction.enabled and (recomputed or not s.calibrated):
            engine_saw_L = behaviour_L if s.calibrated else old_L
            advantages_L *= (engine_saw_L - rollout_L).exp().clamp(max=algo.mismatch_correction.cap)
        return Streams(
            targets_L=torch.tensor(s.response_ids)[mask_R],
            coefficients_L=torch.zeros_like(old_L),
            advantages_L=advantages_L,
            old_logprobs_L=old_L,
            behaviour_logprobs_L=behaviour_L if recomputed else rollout_L,
            calibrated_L=torch.full_like(old_L, s.calibrated, dtype=torch.bool),
            reference_logprobs_L=self.policy(self.start, s)[0] if algo.kl_coef else None,
        )


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def apart(got: Tensor, want: Tensor) -> float:
    """Norm of the difference, relative to the norm of `want`."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def check_training(got: Trained, want: Trained, updates_per_step: int) -> None:
    """Compares log-probs, losses, norms, calibration weights, all gradients of all updates, and the weights after the
    last step."""
    assert got.logprobs.keys() == want.logprobs.keys()
    for name in want.logprobs:
        assert apart(got.logprobs[name], want.logprobs[name]) <= TOLERANCE, name
    assert len(got.gradients) == len(want.gradients) == STEPS * updates_per_step
    for update, (mine, theirs) in enumerate(zip(got.gradients, want.gradients, strict=True)):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert apart(mine[name], theirs[name]) <= TOLERANCE, (update, name)
    assert got.losses == pytest.approx(want.losses, rel=TOLERANCE, abs=1e-6)
    assert got.norms == pytest.approx(want.norms, rel=TOLERANCE)
    assert got.token_weights.keys() == want.token_weights.keys()
    for name, weights in want.token_weights.items():
        assert got.token_weights[name] == pytest.approx(weights, abs=1e-4), name
    for mine_m, theirs_m in zip(got.metrics, want.metrics, strict=True):
        assert {n: mine_m[n] for n in theirs_m} == pytest.approx(theirs_m, abs=1e-9)
    assert got.weights.keys() == want.weights.keys()
    for name in want.weights:
        assert apart(got.weights[name], want.weights[name]) <= TOLERANCE, name
