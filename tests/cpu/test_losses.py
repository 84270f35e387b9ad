"""Losses of `algo.losses` against their papers' formulas in float64, and the log-prob head that computes them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from actors import step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from whole_samples import Whole
from whole_samples import packed as whole_plan

from icrl_kernels import Chunking, HeadOutput, Streams, Terms, VocabShard, logprob_head, policy_head
from icrl_megatron.actor.actor import Actor
from icrl_megatron.actor.plain_loss import PlainLoss
from icrl_megatron.algo import losses
from icrl_megatron.algo.credit import overlong_penalty
from icrl_megatron.algo.loss_check import check_loss
from icrl_megatron.algo.losses import LossInputs
from icrl_megatron.run.checks import validate_settings
from icrl_megatron.settings.algo_schema import LOSSES, AlgoSettings, Calibration, Overlong
from icrl_megatron.settings.loading import load
from icrl_megatron.types import MicroBatch

LENGTHS = (3, 1, 5)
ALGO = AlgoSettings(clip_low=0.2, clip_high=0.3)
VARIANTS = [(name, ALGO) for name in LOSSES]
VARIANTS += [(name, replace(ALGO, dual_clip=1.5)) for name in ("icrl", "gspo")]
WIDTH, VOCABULARY, TEMPERATURE = 8, 40, 0.7


def inputs(seed: int = 0) -> LossInputs:
    """Three sequences with ratios from 0.2 to 5; the last token of the last one does not count."""
    torch.manual_seed(seed)
    tokens = sum(LENGTHS)
    old_L = -torch.rand(tokens, dtype=torch.float64) * 3 - 1
    current_L = (old_L + torch.empty(tokens, dtype=torch.float64).uniform_(-1.6, 1.6)).requires_grad_()
    current_L.data[3] = old_L[3] + 0.9  # a sequence of one token: every loss with a dual clip meets it
    sequence_L = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    mask_L = torch.ones(tokens, dtype=torch.bool)
    mask_L[-1] = False
    advantages_L = torch.tensor([1.5, -0.7, -1.1], dtype=torch.float64)[sequence_L]
    advantages_L[1] = -2.0  # token-wise advantages differ within a sequence
    entropy_L = torch.rand(tokens, dtype=torch.float64)
    return LossInputs(
        current_L, entropy_L, old_L, old_L - 0.1, old_L + 0.1, advantages_L, mask_L, sequence_L, sequences=3
    )


def token_losses(name: str, algo: AlgoSettings, given: LossInputs) -> list[float]:
    """The published formula of one loss, token by token, in plain Python."""
    found = []
    for t in range(len(given.old_L)):
        members = [i for i in range(len(given.old_L)) if given.sequence_L[i] == given.sequence_L[t] and given.mask_L[i]]
        gaps = [float(given.logprobs_L[i].detach() - given.old_L[i]) for i in members]
        mean = sum(gaps) / len(gaps)
        ratio = math.exp(mean if name == "gspo" else float(given.logprobs_L[t].detach() - given.old_L[t]))
        advantage = float(given.advantages_L[t])
        clipped = min(max(ratio, 0.8), 1.3)
        surrogate = min(ratio * advantage, clipped * advantage)
        if algo.dual_clip is not None and advantage < 0:
            surrogate = max(surrogate, algo.dual_clip * advantage)
        if name == "cispo":
            surrogate = clipped * advantage * float(given.logprobs_L[t].detach())
        found.append(-surrogate)
    return found


@pytest.mark.parametrize(("name", "algo"), VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_equals_the_formula_of_its_paper(name: str, algo: AlgoSettings, seed: int) -> None:
    given = inputs(seed)
    term = losses.named(name)(given, algo)
    assert term.loss_L.tolist() == pytest.approx(token_losses(name, algo, given), rel=1e-12)
    if algo.dual_clip is not None:
        assert term.loss_L.tolist() != pytest.approx(token_losses(name, ALGO, given), rel=1e-3)


@pytest.mark.parametrize(("name", "algo"), [(name, algo) for name, algo in VARIANTS if name != "cispo"])
def test_the_gradient_of_a_loss_is_the_difference_quotient(name: str, algo: AlgoSettings) -> None:
    """Except for CISPO, whose importance weight has no gradient by design."""
    given = inputs()

    def total(logprobs_L: Tensor) -> Tensor:
        return (losses.named(name)(replace(given, logprobs_L=logprobs_L), algo).loss_L * given.mask_L).sum()

    assert torch.autograd.gradcheck(total, (given.logprobs_L,), eps=1e-7, atol=1e-6)


def test_clipped_tokens_of_cispo_have_a_gradient() -> None:
    given = inputs()
    term = losses.cispo(given, ALGO)
    (slopes_L,) = torch.autograd.grad(term.loss_L.sum(), given.logprobs_L)
    ratio_L = given.log_ratio_L().detach().exp()
    assert slopes_L.tolist() == pytest.approx((-ratio_L.clamp(0.8, 1.3) * given.advantages_L).tolist(), rel=1e-12)
    assert torch.equal(term.metrics["clipped_weight"], (ratio_L < 0.8) | (ratio_L > 1.3))


def test_tokens_without_a_gradient_are_counted_as_clipped() -> None:
    for dual_clip in (None, 1.5):
        given = inputs()
        term = losses.icrl(given, replace(ALGO, dual_clip=dual_clip))
        (slopes_L,) = torch.autograd.grad(term.loss_L.sum(), given.logprobs_L)
        clipped_L = term.clipped_low_L | term.clipped_high_L
        if dual_clip is not None:
            assert term.metrics["dual_clip"].any() and not (term.metrics["dual_clip"] & clipped_L).any()
            clipped_L = clipped_L | term.metrics["dual_clip"]
        assert clipped_L.any() and torch.equal(clipped_L, slopes_L == 0)


@pytest.mark.parametrize(("name", "algo"), VARIANTS)
def test_an_overflowing_ratio_that_is_clipped_leaves_no_nan(name: str, algo: AlgoSettings) -> None:
    given = inputs()
    far_L = given.old_L + 1000.0
    sign = -1.0 if algo.dual_clip is not None else 1.0
    given = replace(given, logprobs_L=far_L.requires_grad_(), advantages_L=sign * torch.ones_like(far_L))
    loss = losses.named(name)(given, algo).loss_L.sum()
    assert loss.isfinite() and torch.autograd.grad(loss, given.logprobs_L)[0].isfinite().all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_have_the_expected_values_and_gradients(estimator: str) -> None:
    """In expectation k1 and k3 equal the KL, and k2 has its gradient. All are 0 if the policies are equal."""
    torch.manual_seed(1)
    logits_V, reference_V = (torch.randn(50, dtype=torch.float64) for _ in range(2))
    logits_V.requires_grad_()
    policy_V, reference_V = logits_V.log_softmax(0), reference_V.log_softmax(0)
    sampled_V = policy_V.detach().exp()
    expected = (sampled_V * losses.kl_L(estimator, policy_V, reference_V)).sum()
    kl = (policy_V.exp() * (policy_V - reference_V)).sum()
    second = (sampled_V * (policy_V - reference_V).square()).sum() / 2
    assert expected.item() == pytest.approx(float(second if estimator == "k2" else kl), rel=1e-12)
    gradient, of_kl = (torch.autograd.grad(of, logits_V, retain_graph=True)[0] for of in (expected, kl))
    if estimator == "k1":
        assert gradient.abs().max() < 1e-15
    assert torch.allclose(gradient, of_kl, rtol=1e-10) == (estimator == "k2")
    assert losses.kl_L(estimator, policy_V, policy_V).abs().max() == 0


def samples() -> list[Whole]:
    """Attempts and calibrated revisions of 1 to 9 tokens with masked observations."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for i, length in enumerate((4, 1, 9, 6, 7)):
        ids = tuple(torch.randint(VOCABULARY, (length,), generator=draw).tolist())
        logprobs = tuple((-torch.rand(length, generator=draw) - 3.0).tolist())
        mask = tuple(j % 3 != 1 for j in range(length))
        prompt, seen = (1, 2, 3), (1, 2, 3, 4) if i % 2 else (1, 2, 3)
        advantage = (1.0, -1.5, -0.5, 0.75, 2.0)[i]  # exact in float32
        found.append(Whole(f"t#{i}", "t", "attempt", 0, seen, prompt, ids, mask, logprobs, i % 2 == 1, 1.0, advantage))
    return found


def packed(algo: AlgoSettings, budget: int) -> list[tuple[MicroBatch, tuple[str, ...]]]:
    """Micro-batches of one update, and the samples that their loss tokens belong to."""
    plan = whole_plan(samples(), algo, micro_batch_tokens=budget)
    ids = [s.sample_id for s in plan.samples]
    return [(batch, tuple(ids[i] for i in batch.sample_index_L)) for batch in plan.updates[0]]


def hidden_of(owners: tuple[str, ...]) -> Tensor:
    """[L, WIDTH] hidden states, so small that log-probs are near those of `streams_of`."""
    return 0.3 * tokens_of(owners, WIDTH, 1)


def tokens_of(owners: tuple[str, ...], width: int, seed: int) -> Tensor:
    """[L, width] numbers that depend only on the token, not on its batch."""
    rows, seen = [], dict.fromkeys(owners, 0)
    for owner in owners:
        draw = torch.Generator().manual_seed(1000 * seed + 50 * int(owner[2:]) + seen[owner])
        rows.append(torch.randn(width, generator=draw, dtype=torch.float64))
        seen[owner] += 1
    return torch.stack(rows)


def streams_of(batch: MicroBatch, owners: tuple[str, ...], scored: bool) -> Streams:
    """With log-probs around those of the policy of `tokens_of`."""
    old_L, behaviour_L, reference_L = (-3.7 + 0.5 * tokens_of(owners, 3, 2)).unbind(1)
    return Streams(
        targets_L=torch.from_numpy(batch.targets_L),
        coefficients_L=torch.from_numpy(batch.coefficients_L).double(),
        advantages_L=torch.from_numpy(batch.advantages_L).double(),
        old_logprobs_L=old_L if scored else None,
        behaviour_logprobs_L=behaviour_L,
        calibrated_L=torch.from_numpy(batch.calibrated_L),
        reference_logprobs_L=reference_L,
    )


def weight() -> Tensor:
    draw = torch.Generator().manual_seed(4)
    return torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()


def both_heads(algo: AlgoSettings, chunk: int, scored: bool) -> tuple[tuple[HeadOutput, Tensor, Tensor], ...]:
    """Output and gradients of the fused head, and of the same loss as a plain function."""
    shard, chunking, found = VocabShard.whole(VOCABULARY), Chunking(chunk, "torch"), []
    terms = Terms(TEMPERATURE, algo.clip_low, algo.clip_high, algo.calibration.w_max, algo.kl_coef, algo.entropy_coef)
    ((batch, owners),) = packed(algo, budget=1000)
    streams = streams_of(batch, owners, scored)
    plain = PlainLoss(losses.icrl, algo)
    for fused in (True, False):
        hidden_LH, weight_VH = hidden_of(owners).requires_grad_(), weight()
        if fused:
            out = policy_head(hidden_LH, weight_VH, streams, terms, shard, chunking)
        else:
            out = plain(hidden_LH, weight_VH, batch, streams, TEMPERATURE, shard, chunking, None)
        found.append((out, *torch.autograd.grad(out.loss, (hidden_LH, weight_VH))))
    return tuple(found)


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("chunk", [3, 100])
def test_the_fused_head_equals_icrl_as_a_plain_function(chunk: int, scored: bool) -> None:
    algo = AlgoSettings(kl_coef=0.1, entropy_coef=0.02, calibration=Calibration(w_max=1.2))
    fused, plain = both_heads(algo, chunk, scored)
    for name, value in vars(fused[0]).items():
        if name != "metrics":
            torch.testing.assert_close(getattr(plain[0], name), value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(plain[1:], fused[1:], rtol=1e-11, atol=1e-14)
    clipped_L = fused[0].clipped_low_L | fused[0].clipped_high_L
    assert bool(clipped_L.any()) == scored and (fused[0].calibration_weight_L == 1.2).any()


@pytest.mark.parametrize("normalisation", ["sequence_mean", "token_mean", "constant"])
@pytest.mark.parametrize(("name", "algo"), VARIANTS)
def test_packing_does_not_change_the_gradient(name: str, algo: AlgoSettings, normalisation: str) -> None:
    """One micro-batch, several, and one per sequence have the gradient of full logits in float64."""
    algo = replace(algo, loss_normalisation=normalisation, constant_tokens=12, kl_coef=0.1, kl_estimator="k2")
    found = []
    for budget in (1000, 20, 1):
        weight_VH, total, batches = weight(), torch.zeros((), dtype=torch.float64), packed(algo, budget)
        for batch, owners in batches:
            plain = PlainLoss(losses.named(name), algo)
            streams, shard = streams_of(batch, owners, True), VocabShard.whole(VOCABULARY)
            hidden_LH = hidden_of(owners)
            chunking = Chunking(4, "torch")
            total += plain(hidden_LH, weight_VH, batch, streams, TEMPERATURE, shard, chunking, None).loss
        found.append((len(batches), total.detach(), torch.autograd.grad(total, weight_VH)[0]))
    assert [count for count, *_ in found] == [1, 3, 5]
    want = by_hand(name, algo)
    for _, *got in found:
        torch.testing.assert_close(tuple(got), want, rtol=1e-11, atol=1e-14)


def by_hand(name: str, algo: AlgoSettings) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the weight, one sequence at a time over full logits."""
    weight_VH, total = weight(), torch.zeros((), dtype=torch.float64)
    everyone = samples()
    for sample in everyone:
        count = sum(sample.loss_mask)
        owners = (sample.sample_id,) * count
        targets_L = torch.tensor(sample.response_ids)[torch.tensor(sample.loss_mask)]
        logprobs_LV = (hidden_of(owners) @ weight_VH.T / TEMPERATURE).log_softmax(-1)
        current_L = logprobs_LV.gather(1, targets_L[:, None])[:, 0]
        old_L, behaviour_L, reference_L = (-3.7 + 0.5 * tokens_of(owners, 3, 2)).unbind(1)
        gap_L = current_L - old_L
        ratio_L = (gap_L.mean().expand(count) if name == "gspo" else gap_L).exp()
        clipped_L = ratio_L.clamp(0.8, 1.3)
        surrogate_L = torch.minimum(ratio_L * sample.advantage, clipped_L * sample.advantage)
        if algo.dual_clip is not None and sample.advantage < 0:
            surrogate_L = surrogate_L.clamp(min=algo.dual_clip * sample.advantage)
        if name == "cispo":
            surrogate_L = clipped_L.detach() * sample.advantage * current_L
        weight_L = (old_L - behaviour_L).exp().clamp(max=2.0) if sample.calibrated else 1.0
        per_token_L = -weight_L * surrogate_L + 0.1 * (current_L - reference_L).square() / 2
        divisor = {
            "sequence_mean": len(everyone) * count,
            "token_mean": sum(sum(s.loss_mask) for s in everyone),
            "constant": len(everyone) * 12,
        }[algo.loss_normalisation]
        # Coefficients are stored as float32.
        total = total + float(torch.tensor(1.0 / divisor, dtype=torch.float32)) * per_token_L.sum()
    return total.detach(), torch.autograd.grad(total, weight_VH)[0]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_the_head_has_the_gradients_of_full_logits(chunk: int) -> None:
    torch.manual_seed(2)
    hidden_LH = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    weight_VH = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    targets_L = torch.randint(40, (9,))

    def scores(full: bool) -> tuple[Tensor, Tensor]:
        if not full:
            return logprob_head(hidden_LH, weight_VH, targets_L, 0.7, VocabShard(0, 40, 40), Chunking(chunk, "torch"))
        logprobs_LV = (hidden_LH @ weight_VH.T / 0.7).log_softmax(-1)
        return logprobs_LV.gather(1, targets_L[:, None])[:, 0], -(logprobs_LV.exp() * logprobs_LV).sum(-1)

    found = []
    for full in (False, True):
        logprobs_L, entropy_L = scores(full)
        loss = (logprobs_L.square() + torch.sin(entropy_L) * logprobs_L).sum()
        found.append((loss, *torch.autograd.grad(loss, (hidden_LH, weight_VH))))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_token_without_loss_may_have_hidden_states_of_nan() -> None:
    hidden_LH = torch.randn(4, 8)
    hidden_LH[2] = math.nan
    hidden_LH.requires_grad_()
    weight_VH = torch.randn(10, 8, requires_grad=True)
    given = (hidden_LH, weight_VH, torch.tensor([1, 2, 3, 4]), 1.0)
    logprobs_L, entropy_L = logprob_head(*given, VocabShard(0, 10, 10), Chunking(2, "torch"))
    keep_L = torch.tensor([True, True, False, True])
    loss = (logprobs_L.masked_fill(~keep_L, 0.0) + entropy_L.masked_fill(~keep_L, 0.0)).sum()
    for gradient in torch.autograd.grad(loss, (hidden_LH, weight_VH)):
        assert gradient.isfinite().all()


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that is created."""

    elements = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def test_the_full_logits_are_never_created() -> None:
    """No tensor of the forward or backward pass is larger than a chunk of logits or the weight."""
    tokens, columns, chunk = 60, 500, 16
    hidden_LH, weight_VH = torch.randn(tokens, 4, requires_grad=True), torch.randn(columns, 4, requires_grad=True)
    targets_L = torch.randint(columns, (tokens,))
    with Largest() as seen:
        cut = VocabShard.whole(columns), Chunking(chunk, "torch")
        logprobs_L, entropy_L = logprob_head(hidden_LH, weight_VH, targets_L, 1.0, *cut)
        (logprobs_L.sum() + entropy_L.sum()).backward()
    assert seen.elements == chunk * columns < tokens * columns


@pytest.mark.parametrize(("name", "algo"), VARIANTS)
def test_the_actor_reports_the_metrics_of_a_loss(make: Callable[..., Actor], name: str, algo: AlgoSettings) -> None:
    """In a step's first update every ratio is 1. In later ones ratios differ, and tight bounds clip them."""
    given = {"loss": name, "dual_clip": None if algo.dual_clip is None else 1.0, "clip_low": 1e-4, "clip_high": 1e-4}
    actor = make("fp32", updates_per_step=6, **given)
    by_step = [step(actor, seed).metrics for seed in range(6)]
    metrics = {key: sum(m[key] for m in by_step) / len(by_step) for key in by_step[0]}
    if name == "gspo":
        assert 0 < abs(metrics["loss_sequence_ratio"] - 1.0) < 0.2
    if name == "cispo":
        assert 0 < metrics["loss_clipped_weight"] < 1 and metrics["clip_low"] == metrics["clip_high"] == 0
    else:
        assert metrics["clip_low"] + metrics["clip_high"] > 0
    if algo.dual_clip is not None:
        assert 0 < metrics["loss_dual_clip"] < 1
    assert not any(n.startswith("loss_") for n in step(make("fp32", updates_per_step=2)).metrics)


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0.0), (80, 0.0), (85, 0.125), (90, 0.25), (100, 0.5), (1000, 0.5)])
def test_the_overlong_penalty_grows_linearly_up_to_its_maximum(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, Overlong(100, 20, 0.5)) == penalty
    assert overlong_penalty(tokens, Overlong()) == 0.0


@pytest.mark.parametrize(("name", "algo"), VARIANTS)
def test_every_built_in_loss_passes_the_check(name: str, algo: AlgoSettings) -> None:
    check_loss(name, algo)


def test_a_documented_loss_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Actor]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "EXTENDING.md").read_text()
    section = page.partition("## A loss")[2].partition("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    name = re.findall(r"algo\.loss=(my_losses:\w+)", section)[0]
    validate_settings(load("rulebook_easy", [f"algo.loss={name}"]))
    given = inputs()
    term = losses.named(name)(given, ALGO)
    ratio_L = given.log_ratio_L().detach().exp()
    expected_L = torch.where(given.advantages_L > 0, -ratio_L, -ratio_L.clamp(max=1.0)) * given.advantages_L
    assert torch.allclose(term.loss_L, expected_L)
    actor = make("fp32", updates_per_step=6, loss=name)
    stats = [step(actor, seed) for seed in range(3)][-1]
    assert stats.skipped_updates == 0 and 0 < stats.metrics["loss_distrusted"] < 1
