"""Critique-GRPO's policy shaping (arXiv 2506.03106): the formula in float64, in every head, and as a setting."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from head_cases import EXACT, TORCH, TRITON, assert_same, make_inputs, needs_triton, run_head, run_reference

from icrl_kernels import Streams, Terms
from icrl_kernels.objective import token_objective
from icrl_megatron.algo.credit import credit
from icrl_megatron.algo.headers import EpisodeHeader, headers_of
from icrl_megatron.algo.samples import to_samples
from icrl_megatron.run.algo_checks import check_algo
from icrl_megatron.settings import loading as settings
from icrl_megatron.settings.algo_schema import AlgoSettings, Calibration
from icrl_megatron.settings.arms import ARMS
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Task, Turn
from icrl_megatron.utils.errors import ConfigError

GAMMA = 0.1
SHAPED = Terms(shaping_gamma=GAMMA)


def streams(advantages: list[float], shaped: list[bool], old: list[float]) -> Streams:
    L = len(advantages)
    as_double = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    return Streams(
        targets_L=torch.zeros(L, dtype=torch.long),
        coefficients_L=as_double([0.25] * L),
        advantages_L=as_double(advantages),
        old_logprobs_L=as_double(old),
        behaviour_logprobs_L=as_double([-0.3] * L),
        calibrated_L=torch.tensor(shaped),
    )


def test_shaped_token_has_weight_p_over_p_plus_gamma() -> None:
    p = np.array([1e-9, 0.01, 0.1, 0.5, 0.999])
    logprobs_L = torch.tensor(np.log(p), requires_grad=True)
    advantages = np.array([1.0, -1.0, 2.0, 1.0, -0.5])
    given = streams(advantages.tolist(), [True] * 5, [-30.0] * 5)  # ratios that would be clipped or overflow
    found = token_objective(logprobs_L, torch.zeros(5, dtype=torch.float64), given, SHAPED)
    f = p / (p + GAMMA)
    assert found.loss_L.detach().numpy() == pytest.approx(-0.25 * f * advantages, rel=1e-12)
    assert found.calibration_weight_L.numpy() == pytest.approx(f, rel=1e-12)
    assert not found.clipped_low_L.any() and not found.clipped_high_L.any()
    found.loss_L.sum().backward()
    assert logprobs_L.grad is not None
    slope = p * GAMMA / (p + GAMMA) ** 2  # df/dlogp: largest at p = gamma
    assert logprobs_L.grad.numpy() == pytest.approx(-0.25 * slope * advantages, rel=1e-9)


def test_other_tokens_are_unchanged() -> None:
    logprobs_L = torch.log(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    entropy_L = torch.ones(3, dtype=torch.float64)
    given = streams([1.0, -1.0, 1.0], [False] * 3, [-1.7, -0.6, -0.3])
    shaped, plain = (token_objective(logprobs_L, entropy_L, given, terms) for terms in (SHAPED, Terms()))
    assert torch.equal(shaped.loss_L, plain.loss_L) and torch.equal(shaped.clipped_high_L, plain.clipped_high_L)


@pytest.mark.parametrize(
    "how", [EXACT, TORCH, pytest.param(TRITON, marks=needs_triton)], ids=["float64", "torch", "triton"]
)
@pytest.mark.parametrize("terms", [SHAPED, replace(SHAPED, shaping_gamma=0.5, entropy_coef=0.02, kl_coef=0.1)])
def test_every_head_computes_the_same_loss(how: object, terms: Terms) -> None:
    hidden_LH, weight_VH, given = make_inputs(23, 60, terms)
    truth = run_reference(hidden_LH, weight_VH, given, terms, 60)
    weights_L = truth[0].calibration_weight_L
    shaped_L = given.calibrated_L & (given.coefficients_L != 0)  # type: ignore[operator]
    probability_L = truth[0].logprobs_L.exp()
    assert torch.allclose(weights_L[shaped_L], (probability_L / (probability_L + terms.shaping_gamma))[shaped_L])
    assert_same(run_head(hidden_LH, weight_VH, given, terms, 60, 8, how), truth, how)  # type: ignore[arg-type]


def episode(index: int, outcomes: list[float]) -> Episode:
    said = Completion((1, 2), (-0.5, -0.5), "stop", 0)
    attempts = tuple(
        Attempt(r, (5, 77, 6) if r else (5, 6), (5, 6), (Turn(said, "x", "x", "", ()),), of, of == 1.0, "", "done")
        for r, of in enumerate(outcomes)
    )
    critiques = tuple(Critique(r, (9,), said, "try left") for r in range(len(outcomes) - 1))
    return Episode(Task("maze/train/0", "maze", "train", "0"), index, attempts, critiques)


def test_revisions_are_shaped_and_grouped_with_attempts_without_std() -> None:
    algo = settings.load("rulebook_hard", ARMS["critique_grpo"].changes).algo
    assert (algo.shaping_gamma, algo.calibration.enabled, algo.normalise_std) == (0.1, False, False)
    episodes = [episode(0, [0.0, 1.0]), episode(1, [0.5])]
    samples = {s.sample_id.split("#")[1]: s for s in credit(headers_of(episodes), algo, train_critic=False).samples}
    calibrated = {name: s.calibrated for name, s in samples.items()}
    assert calibrated == {"0/0/attempt": False, "0/1/revision": True, "1/0/attempt": False}
    assert {name: s.advantage for name, s in samples.items()} == pytest.approx(
        {"0/0/attempt": -0.5, "0/1/revision": 0.5, "1/0/attempt": 0.0}
    )
    revision = samples["0/1/revision"]
    assert (revision.train_prompt_tokens, revision.behaviour_prompt_tokens) == (2, 3) and not revision.same_prompt
    off = AlgoSettings(calibration=Calibration(enabled=False))
    assert not any(s.calibrated for s in to_samples(EpisodeHeader.of(episodes[0]), off, False))


def test_best_revision_of_a_task_is_trained_with_all_attempts() -> None:
    episodes = [episode(0, [0.0, 0.2]), episode(1, [0.0, 1.0]), episode(2, [0.5, 1.0]), episode(3, [1.0])]
    algo = settings.load("rulebook_hard", ARMS["critique_grpo"].changes).algo
    report = credit(headers_of(episodes), algo, train_critic=False)
    names = [s.sample_id.split("#")[1] for s in report.samples]
    assert names == ["0/0/attempt", "1/0/attempt", "1/1/revision", "2/0/attempt", "3/0/attempt"]
    assert report.dropped_samples == 2
    assert sum(s.advantage for s in report.samples) == pytest.approx(0.0)  # the baseline is over these five
    two = credit(headers_of(episodes), replace(algo, revisions_per_task=2), train_critic=False)
    assert sum(s.role == "revision" for s in two.samples) == 2
    everything = credit(headers_of(episodes), replace(algo, revisions_per_task=None), train_critic=False)
    assert sum(s.role == "revision" for s in everything.samples) == 3 and everything.dropped_samples == 0


@pytest.mark.parametrize("wrong", ["algo.calibration.enabled=true", "algo.internalise=false"])
def test_shaping_excludes_the_calibration_weight(wrong: str) -> None:
    loaded = settings.load("rulebook_hard", [*ARMS["critique_grpo"].changes, wrong])
    with pytest.raises(ConfigError, match=r"algo\.shaping_gamma=0\.1 replaces the calibration weight"):
        check_algo(loaded.algo, loaded)
