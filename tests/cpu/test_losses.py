"""Losses of `algo.losses` against their papers' formulas in float64, and the log-prob head that carries them."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from icrl_kernels import Chunking, VocabShard, logprob_head
from icrl_megatron.algo import losses
from icrl_megatron.algo.credit import overlong_penalty
from icrl_megatron.algo.losses import LossInputs
from icrl_megatron.run.checks import validate_settings
from icrl_megatron.settings.limits import LOSSES
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import AlgoSettings, Overlong
from icrl_megatron.utils.errors import ConfigError

LENGTHS = (3, 1, 5)
ALGO = AlgoSettings(clip_low=0.2, clip_high=0.3, dual_clip=2.0)


def inputs(seed: int = 0) -> LossInputs:
    """Three sequences with ratios from 0.2 to 5; the last token of the last one does not count."""
    torch.manual_seed(seed)
    tokens = sum(LENGTHS)
    old_L = -torch.rand(tokens, dtype=torch.float64) * 3 - 1
    current_L = (old_L + torch.empty(tokens, dtype=torch.float64).uniform_(-1.6, 1.6)).requires_grad_()
    sequence_L = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    mask_L = torch.ones(tokens, dtype=torch.bool)
    mask_L[-1] = False
    advantages_L = torch.tensor([1.5, -0.7, -1.1], dtype=torch.float64)[sequence_L]
    advantages_L[1] = -2.0  # token-wise advantages differ within a sequence
    return LossInputs(current_L, old_L, old_L - 0.1, old_L + 0.1, advantages_L, mask_L, sequence_L, 3)


def token_losses(name: str, given: LossInputs) -> list[float]:
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
        if name == "dual_clip" and advantage < 0:
            surrogate = max(surrogate, 2.0 * advantage)
        if name == "cispo":
            surrogate = clipped * advantage * float(given.logprobs_L[t].detach())
        found.append(-surrogate)
    return found


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_is_its_papers_formula(name: str, seed: int) -> None:
    given = inputs(seed)
    term = losses.named(name)(given, ALGO)
    assert term.loss_L.tolist() == pytest.approx(token_losses(name, given), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cispo"])
def test_its_gradient_is_the_difference_quotient(name: str) -> None:
    """Not CISPO's: its importance weight is a constant by design."""
    given = inputs()

    def total(logprobs_L: Tensor) -> Tensor:
        fresh = LossInputs(**{**vars(given), "logprobs_L": logprobs_L})
        return (losses.named(name)(fresh, ALGO).loss_L * given.mask_L).sum()

    assert torch.autograd.gradcheck(total, (given.logprobs_L,), eps=1e-7, atol=1e-6)


def test_no_token_of_cispo_loses_its_gradient() -> None:
    given = inputs()
    (slopes_L,) = torch.autograd.grad(losses.cispo(given, ALGO).loss_L.sum(), given.logprobs_L)
    ratio_L = given.ratio_L().detach().clamp(0.8, 1.3)
    assert slopes_L.tolist() == pytest.approx((-ratio_L * given.advantages_L).tolist(), rel=1e-12)


def test_clipped_tokens_are_counted_where_the_gradient_is_gone() -> None:
    for name in ("icrl", "dual_clip"):
        given = inputs()
        term = losses.named(name)(given, ALGO)
        (slopes_L,) = torch.autograd.grad(term.loss_L.sum(), given.logprobs_L)
        clipped_L = term.clipped_low_L | term.clipped_high_L
        assert clipped_L.any() and torch.equal(clipped_L, slopes_L == 0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator: str) -> None:
    """In expectation k1 and k3 are the KL; k2 has its gradient (at equality all are 0)."""
    torch.manual_seed(1)
    policy_V, reference_V = (torch.randn(50, dtype=torch.float64).log_softmax(0) for _ in range(2))
    expected = float((policy_V.exp() * losses.kl_L(estimator, policy_V, reference_V)).sum())
    kl = float((policy_V.exp() * (policy_V - reference_V)).sum())
    second = float((policy_V.exp() * (policy_V - reference_V).square()).sum()) / 2
    assert expected == pytest.approx(second if estimator == "k2" else kl, rel=1e-12)
    assert losses.kl_L(estimator, policy_V, policy_V).abs().max() == 0


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


def test_a_token_without_a_slope_shields_from_its_logits() -> None:
    hidden_LH = torch.randn(4, 8)
    hidden_LH[2] = math.nan
    hidden_LH.requires_grad_()
    weight_VH = torch.randn(10, 8, requires_grad=True)
    logprobs_L, entropy_L = logprob_head(
        hidden_LH, weight_VH, torch.tensor([1, 2, 3, 4]), 1.0, VocabShard(0, 10, 10), Chunking(2, "torch")
    )
    keep_L = torch.tensor([True, True, False, True])
    loss = (logprobs_L.masked_fill(~keep_L, 0.0) + entropy_L.masked_fill(~keep_L, 0.0)).sum()
    for gradient in torch.autograd.grad(loss, (hidden_LH, weight_VH)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0.0), (80, 0.0), (85, 0.125), (90, 0.25), (100, 0.5), (1000, 0.5)])
def test_the_overlong_penalty(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, Overlong(100, 20, 0.5)) == penalty
    assert overlong_penalty(tokens, Overlong()) == 0.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algo.loss=ppo"], "algo.loss=ppo: choose one of icrl, dual_clip, gspo, cispo"),
        (["algo.loss=nowhere:loss"], "algo.loss=nowhere:loss: No module named 'nowhere'"),
        (["algo.loss=math:pie"], "module 'math' has no attribute 'pie'"),
        (["algo.loss=math:pi"], "algo.loss=math:pi: that is no function"),
        (["algo.dual_clip=5"], "algo.dual_clip=5 has no effect with algo.loss=icrl"),
        (["algo.kl_estimator=k1"], "algo.kl_estimator=k1 has no effect without a KL term"),
        (["algo.loss_normalisation=constant"], "and algo.constant_tokens together"),
        (["algo.constant_tokens=64"], "and algo.constant_tokens together"),
        (["algo.overlong.max_tokens=8", "algo.overlong.buffer_tokens=9"], "is more than algo.overlong.max_tokens=8"),
        (
            ["algo.shaping_gamma=0.1", "algo.calibration.enabled=false", "algo.loss=gspo"],
            "algo.shaping_gamma=0.1 is a part of ICRL's own objective",
        ),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate_settings(load("rulebook_easy", overrides))


def test_the_documented_loss_of_ones_own_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    ratio_L = given.ratio_L().detach()
    expected_L = torch.where(given.advantages_L > 0, -ratio_L, -ratio_L.clamp(max=1.0)) * given.advantages_L
    assert torch.allclose(term.loss_L, expected_L)
