"""The chunked head against the eager one, and both against the formulas of the paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from icrl_kernels import (
    HeadOutput,
    Streams,
    Terms,
    VocabShard,
    policy_head,
    reference_head,
    reference_scores,
    score_head,
    token_objective,
)

WIDTH = 16


def make_inputs(
    tokens: int, rows: int, terms: Terms, seed: int = 0, scale: float = 1.0, vocabulary: int | None = None
) -> tuple[Tensor, Tensor, Streams]:
    """Float64 hidden states and weight, and streams whose old log-probs lie around the policy's own."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary = vocabulary or rows
    hidden_LH = torch.randn(tokens, WIDTH, generator=draw, dtype=torch.float64)
    weight_VH = scale * torch.randn(rows, WIDTH, generator=draw, dtype=torch.float64)
    targets_L = torch.randint(vocabulary, (tokens,), generator=draw)
    logprobs_L, _ = reference_scores(hidden_LH, weight_VH, targets_L, terms.temperature, vocabulary)

    def around(spread: float) -> Tensor:
        return logprobs_L + spread * torch.randn(tokens, generator=draw, dtype=torch.float64)

    streams = Streams(
        targets_L=targets_L,
        coefficients_L=torch.rand(tokens, generator=draw) * (torch.rand(tokens, generator=draw) > 0.2),
        advantages_L=torch.randn(tokens, generator=draw, dtype=torch.float64),
        old_logprobs_L=around(0.3),
        behaviour_logprobs_L=around(0.7),
        calibrated_L=torch.rand(tokens, generator=draw) > 0.5,
        reference_logprobs_L=around(0.3) if terms.kl_coef else None,
    )
    return hidden_LH, weight_VH, streams


def run_head(
    hidden_LH: Tensor, weight_VH: Tensor, streams: Streams, terms: Terms, vocabulary: int, chunk: int | None
) -> tuple[HeadOutput, Tensor, Tensor]:
    """Output and gradients of the chunked head, or of the eager one where `chunk` is None."""
    hidden_LH, weight_VH = hidden_LH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    if chunk is None:
        output = reference_head(hidden_LH, weight_VH, streams, terms, vocabulary)
    else:
        output = policy_head(hidden_LH, weight_VH, streams, terms, VocabShard.whole(vocabulary), chunk)
    output.loss.backward()
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    return output, hidden_LH.grad, weight_VH.grad


def assert_near(value: Tensor, truth: Tensor, tolerance: float = 1e-5, floor: float = 1e-6) -> None:
    """The error's norm is within `tolerance` of the truth's, or `floor` an element where the truth is all but 0."""
    error = (value.double() - truth.double()).norm()
    assert error <= tolerance * truth.double().norm() + floor * max(1, truth.numel()) ** 0.5, float(error)


def assert_same(head: tuple[HeadOutput, Tensor, Tensor], truth: tuple[HeadOutput, Tensor, Tensor]) -> None:
    # The loss is a sum whose terms cancel: what counts is the error a token.
    assert_near(head[0].loss.detach(), truth[0].loss.detach(), floor=1e-6 * max(1, truth[0].logprobs_L.numel()))
    for name in ("logprobs_L", "entropy_L"):
        assert_near(getattr(head[0], name), getattr(truth[0], name))
    assert_near(head[1], truth[1])
    assert_near(head[2], truth[2])


terms_drawn = st.builds(
    Terms,
    temperature=st.floats(0.3, 3.0),
    clip_low=st.floats(0.0, 0.5),
    clip_high=st.floats(0.0, 0.5),
    w_max=st.floats(0.2, 4.0),
    kl_coef=st.sampled_from([0.0, 0.05]),
    entropy_coef=st.sampled_from([0.0, 0.02]),
)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    rows=st.integers(2, 150),
    padding=st.integers(0, 5),
    chunk=st.integers(1, 48),
    scale=st.floats(0.05, 2.0),
    terms=terms_drawn,
    has_old=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_chunked_equals_eager(
    tokens: int,
    rows: int,
    padding: int,
    chunk: int,
    scale: float,
    terms: Terms,
    has_old: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    hidden_LH, weight_VH, streams = make_inputs(tokens, rows + padding, terms, seed, scale, vocabulary=rows)
    streams = replace(streams, old_logprobs_L=streams.old_logprobs_L if has_old else None)
    truth = run_head(hidden_LH, weight_VH, streams, terms, rows, None)
    head = run_head(hidden_LH.to(dtype), weight_VH.to(dtype), streams, terms, rows, chunk)
    # A ratio within rounding of a bound may fall on its other side in float32, where the gradient is another one.
    assume(torch.equal(clipped(head[0]), clipped(truth[0])))
    assert_same(head, truth)
    assert bool((head[2][rows:] == 0).all())
    scores = score_head(hidden_LH, weight_VH, streams.targets_L, terms.temperature, VocabShard.whole(rows), chunk)
    assert_near(scores[0], truth[0].logprobs_L, 1e-12, 1e-12)
    assert_near(scores[1], truth[0].entropy_L, 1e-12, 1e-12)


def clipped(output: HeadOutput) -> Tensor:
    return output.clipped_low_L | output.clipped_high_L


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_float64_is_exact_to_rounding(entropy_coef: float) -> None:
    terms = Terms(temperature=0.7, kl_coef=0.1, entropy_coef=entropy_coef)
    hidden_LH, weight_VH, streams = make_inputs(30, 97, terms)
    truth = run_head(hidden_LH, weight_VH, streams, terms, 97, None)
    head = run_head(hidden_LH, weight_VH, streams, terms, 97, 7)
    for got, want in zip((head[0].loss.detach(), *head[1:]), (truth[0].loss.detach(), *truth[1:]), strict=True):
        assert_near(got, want, 1e-13, 1e-15)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("has_old", [True, False])
def test_gradcheck_of_the_reference(entropy_coef: float, has_old: bool) -> None:
    terms = Terms(temperature=1.3, kl_coef=0.1, entropy_coef=entropy_coef)
    hidden_LH, weight_VH, streams = make_inputs(5, 11, terms, seed=3)

    def loss(hidden_LH: Tensor, weight_VH: Tensor) -> Tensor:
        return reference_head(hidden_LH, weight_VH, streams, terms, 11).loss

    if not has_old:  # then the pass itself is the constant in ratio and weight: its log-probs before any perturbation
        own = reference_head(hidden_LH, weight_VH, streams, terms, 11).logprobs_L
        streams = replace(streams, old_logprobs_L=own)
    assert torch.autograd.gradcheck(loss, (hidden_LH.requires_grad_(), weight_VH.requires_grad_()))


def test_objective_is_the_formula_of_the_paper() -> None:
    terms = Terms(clip_low=0.2, clip_high=0.28, w_max=2.0, kl_coef=0.3, entropy_coef=0.1)
    logprobs_L = torch.linspace(-3, -0.1, 24, dtype=torch.float64)
    _, _, streams = make_inputs(24, 30, terms, seed=5)
    entropy_L = torch.rand(24, dtype=torch.float64)
    old_L, behaviour_L, reference_L = streams.old_logprobs_L, streams.behaviour_logprobs_L, streams.reference_logprobs_L
    assert old_L is not None and behaviour_L is not None
    assert reference_L is not None and streams.calibrated_L is not None
    old_L = logprobs_L + 0.5 * torch.sin(torch.arange(24.0, dtype=torch.float64))
    got = token_objective(logprobs_L, entropy_L, replace(streams, old_logprobs_L=old_L), terms)
    for i in range(24):
        ratio, advantage = float(torch.exp(logprobs_L[i] - old_L[i])), float(streams.advantages_L[i])
        weight = min(float(torch.exp(old_L[i] - behaviour_L[i])), 2.0) if streams.calibrated_L[i] else 1.0
        policy = weight * min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
        gap = float(reference_L[i] - logprobs_L[i])
        kl = float(torch.exp(torch.tensor(gap, dtype=torch.float64))) - gap - 1
        want = float(streams.coefficients_L[i]) * (-policy + 0.3 * kl - 0.1 * float(entropy_L[i]))
        assert got.loss_L[i].item() == pytest.approx(want, rel=1e-12, abs=1e-15)
        if streams.coefficients_L[i] != 0:
            assert float(got.ratio_L[i]) == pytest.approx(ratio)
            assert float(got.calibration_weight_L[i]) == pytest.approx(weight)
            assert bool(got.clipped_low_L[i]) == (advantage < 0 and ratio < 0.8)
            assert bool(got.clipped_high_L[i]) == (advantage > 0 and ratio > 1.28)


def one_token(advantage: float, old: float, behaviour: float | None = None) -> Streams:
    one = torch.ones(1, dtype=torch.float64)
    calibrated = None if behaviour is None else torch.tensor([True])
    denominator = None if behaviour is None else behaviour * one
    return Streams(torch.zeros(1, dtype=torch.int64), one, advantage * one, old * one, denominator, calibrated)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("ratio", "inside"), [(1.5, True), (1.5 + 1e-9, False), (0.5, True), (0.5 - 1e-9, False)])
def test_gradient_passes_at_the_clip_edge_and_stops_behind_it(advantage: float, ratio: float, inside: bool) -> None:
    terms = Terms(clip_low=0.5, clip_high=0.5)
    logprob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    exact = float(logprob.detach().exp())
    if inside:  # put the bound exactly where the ratio is
        terms = Terms(clip_low=1 - exact if ratio < 1 else 0.5, clip_high=exact - 1 if ratio > 1 else 0.5)
    objective = token_objective(logprob, torch.zeros(1, dtype=torch.float64), one_token(advantage, 0.0), terms)
    (slope,) = torch.autograd.grad(objective.loss_L.sum(), logprob)
    stops = not inside and (advantage > 0) == (ratio > 1)
    assert float(slope) == (0.0 if stops else pytest.approx(-advantage * ratio))
    assert bool(objective.clipped_low_L | objective.clipped_high_L) == stops


def test_calibration_weight_at_its_bound_and_beyond() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    at = float(torch.tensor(0.5, dtype=torch.float64).exp())
    for behaviour, w_max, want in ((-1.5, at, at), (-1.5, at * 2, at), (-9.0, 2.0, 2.0), (-2000.0, 2.0, 2.0)):
        objective = token_objective(zero - 1, zero, one_token(1.0, -1.0, behaviour), Terms(w_max=w_max))
        assert float(objective.calibration_weight_L) == want
        assert objective.loss_L.item() == -want


def test_without_old_logprobs_the_pass_itself_is_the_old_policy() -> None:
    terms = Terms()
    hidden_LH, weight_VH, streams = make_inputs(20, 50, terms)
    own_L, _ = score_head(hidden_LH, weight_VH, streams.targets_L, 1.0, VocabShard.whole(50), 7)
    implied = run_head(hidden_LH, weight_VH, replace(streams, old_logprobs_L=None), terms, 50, 7)
    given_ = run_head(hidden_LH, weight_VH, replace(streams, old_logprobs_L=own_L), terms, 50, 7)
    assert bool((implied[0].ratio_L == 1).all())
    assert_same(implied, given_)
    assert float((implied[0].calibration_weight_L - given_[0].calibration_weight_L).abs().max()) < 1e-12


def test_supervised_training_is_cross_entropy() -> None:
    hidden_LH, weight_VH, streams = make_inputs(20, 50, Terms())
    ones_L = torch.ones(20, dtype=torch.float64)
    supervised = Streams(streams.targets_L, ones_L / 20, ones_L)
    _, grad_hidden, grad_weight = run_head(hidden_LH, weight_VH, supervised, Terms(), 50, 6)
    hidden_LH.requires_grad_(), weight_VH.requires_grad_()
    torch.nn.functional.cross_entropy(hidden_LH @ weight_VH.T, streams.targets_L).backward()
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    assert_near(grad_hidden, hidden_LH.grad, 1e-12, 1e-15)
    assert_near(grad_weight, weight_VH.grad, 1e-12, 1e-15)


def test_all_logits_below_minus_120() -> None:
    terms = Terms(entropy_coef=0.05)
    hidden_LH, weight_VH, streams = make_inputs(12, 40, terms)
    hidden_LH[:, 0], weight_VH[:, 0] = 1.0, -300.0 + weight_VH[:, 0]
    streams = replace(streams, old_logprobs_L=None, behaviour_logprobs_L=None, calibrated_L=None)
    assert float((hidden_LH @ weight_VH.T).max()) < -120
    truth = run_head(hidden_LH, weight_VH, streams, terms, 40, None)
    head = run_head(hidden_LH.float(), weight_VH.float(), streams, terms, 40, 5)
    assert bool(head[0].logprobs_L.isfinite().all())
    # A float32 logit of size 300 is only known to 300 * 6e-8 a term: the inputs' own rounding.
    assert_near(head[0].logprobs_L, truth[0].logprobs_L, 1e-4)
    assert_near(head[1], truth[1], 1e-4)
    exact = run_head(hidden_LH, weight_VH, streams, terms, 40, 5)
    assert_same(exact, truth)


def test_peaked_rows_never_have_a_positive_logprob() -> None:
    hidden_LH, weight_VH, _ = make_inputs(64, 300, Terms(), scale=60.0)
    targets_L = (hidden_LH @ weight_VH.T).argmax(1)
    shard = VocabShard.whole(300)
    for dtype in (torch.float32, torch.float64):
        logprobs_L, entropy_L = score_head(hidden_LH.to(dtype), weight_VH.to(dtype), targets_L, 1.0, shard, 10)
        assert bool((logprobs_L <= 0).all()) and float(logprobs_L.max()) > -1e-6
        assert bool((entropy_L >= 0).all())


def test_no_tokens_one_token_and_all_coefficients_zero() -> None:
    terms = Terms(entropy_coef=0.1)
    for tokens in (0, 1, 9):
        hidden_LH, weight_VH, streams = make_inputs(tokens, 20, terms)
        silent = replace(streams, coefficients_L=torch.zeros_like(streams.coefficients_L))
        output, grad_hidden, grad_weight = run_head(hidden_LH, weight_VH, silent, terms, 20, 4)
        assert output.loss.item() == 0.0 and output.logprobs_L.shape == (tokens,)
        assert grad_hidden.shape == hidden_LH.shape and bool((grad_hidden == 0).all())
        assert grad_weight.shape == weight_VH.shape and bool((grad_weight == 0).all())
        scores = score_head(hidden_LH, weight_VH, streams.targets_L, 1.0, VocabShard.whole(20))
        assert scores[0].shape == scores[1].shape == (tokens,)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_silent_token_shields_its_poison_and_a_live_one_is_counted(poison: float, entropy_coef: float) -> None:
    terms = Terms(entropy_coef=entropy_coef)
    hidden_LH, weight_VH, streams = make_inputs(9, 20, terms)
    coefficients_L = torch.ones(9, dtype=torch.float64)
    coefficients_L[4] = 0.0
    streams = replace(streams, coefficients_L=coefficients_L)
    clean = run_head(hidden_LH, weight_VH, streams, terms, 20, 4)
    hidden_LH[4, 2] = poison
    silent = run_head(hidden_LH, weight_VH, streams, terms, 20, 4)
    assert int(silent[0].non_finite) == 0
    assert torch.equal(silent[0].loss, clean[0].loss)
    assert torch.equal(silent[1], clean[1]) and torch.equal(silent[2], clean[2])
    live = replace(streams, coefficients_L=torch.ones(9, dtype=torch.float64))
    counted = run_head(hidden_LH, weight_VH, live, terms, 20, 4)[0]
    assert int(counted.non_finite) == 1 and not bool(counted.loss.isfinite())


def test_an_overflowing_ratio_that_is_clipped_leaves_finite_gradients() -> None:
    hidden_LH, weight_VH, streams = make_inputs(6, 20, Terms())
    far = replace(streams, old_logprobs_L=torch.full((6,), -2000.0), advantages_L=torch.ones(6))
    output, grad_hidden, grad_weight = run_head(hidden_LH, weight_VH, far, Terms(), 20, 4)
    assert bool(clipped(output)[streams.coefficients_L != 0].all())
    want = -1.28 * (output.calibration_weight_L * streams.coefficients_L).sum()
    assert output.loss.item() == pytest.approx(want.item())
    assert bool((grad_hidden == 0).all()) and bool((grad_weight == 0).all())


def test_chunk_size_does_not_change_the_result() -> None:
    terms = Terms(temperature=0.8, kl_coef=0.1, entropy_coef=0.05)
    hidden_LH, weight_VH, streams = make_inputs(33, 61, terms)
    whole = run_head(hidden_LH.float(), weight_VH.float(), streams, terms, 61, 33)
    for chunk in (1, 2, 16, 32, 1000):
        assert_same(run_head(hidden_LH.float(), weight_VH.float(), streams, terms, 61, chunk), whole)


def test_gradient_accumulation_and_scaling() -> None:
    terms = Terms(entropy_coef=0.05)
    hidden_LH, weight_VH, streams = make_inputs(24, 40, terms)
    _, grad_hidden, grad_weight = run_head(hidden_LH, weight_VH, streams, terms, 40, 5)
    hidden_LH.requires_grad_(), weight_VH.requires_grad_()
    for part in (slice(0, 10), slice(10, 24)):
        output = policy_head(hidden_LH[part], weight_VH, streams.slice(part), terms, VocabShard.whole(40), 5)
        (output.loss * 3.0).backward()
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    assert_near(hidden_LH.grad, 3 * grad_hidden, 1e-12, 1e-15)
    assert_near(weight_VH.grad, 3 * grad_weight, 1e-12, 1e-15)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing(use_reentrant: bool) -> None:
    terms = Terms()
    inputs_LH, weight_VH, streams = make_inputs(12, 40, terms)
    mix_HH = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shard = VocabShard.whole(40)

    def gradients(wrapped: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (inputs_LH, mix_HH, weight_VH)]

        def loss(x_LH: Tensor, mix_HH: Tensor, weight_VH: Tensor) -> Tensor:
            return policy_head(torch.tanh(x_LH @ mix_HH), weight_VH, streams, terms, shard, 5).loss

        out = checkpoint(loss, *leaves, use_reentrant=use_reentrant) if wrapped else loss(*leaves)
        out.backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    plain, wrapped = gradients(False), gradients(True)
    assert len(plain) == len(wrapped) == 3
    for got, want in zip(wrapped, plain, strict=True):
        assert_near(got, want, 1e-12, 1e-15)


def test_a_second_backward_is_refused() -> None:
    hidden_LH, weight_VH, streams = make_inputs(4, 10, Terms())
    loss = policy_head(hidden_LH.requires_grad_(), weight_VH, streams, Terms(), VocabShard.whole(10)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        loss.backward()


def test_only_the_wanted_gradients_are_formed() -> None:
    terms = Terms()
    hidden_LH, weight_VH, streams = make_inputs(8, 20, terms)
    _, grad_hidden, grad_weight = run_head(hidden_LH, weight_VH, streams, terms, 20, 3)
    shard = VocabShard.whole(20)
    policy_head(hidden_LH.requires_grad_(), weight_VH, streams, terms, shard, 3).loss.backward()
    policy_head(hidden_LH.detach(), weight_VH.requires_grad_(), streams, terms, shard, 3).loss.backward()
    assert hidden_LH.grad is not None and weight_VH.grad is not None
    assert torch.equal(hidden_LH.grad, grad_hidden) and torch.equal(weight_VH.grad, grad_weight)
    with torch.no_grad():
        assert not policy_head(hidden_LH, weight_VH, streams, terms, shard, 3).loss.requires_grad


@pytest.mark.parametrize("rows", [333, 5000])
def test_bf16_inputs_are_far_closer_to_float64_than_bf16_arithmetic(rows: int) -> None:
    terms = Terms(entropy_coef=0.02)
    hidden_LH, weight_VH, streams = make_inputs(40, rows, terms, scale=0.5)
    hidden_LH, weight_VH = hidden_LH.bfloat16(), weight_VH.bfloat16()
    streams = replace(streams, old_logprobs_L=None)
    truth = run_head(hidden_LH.double(), weight_VH.double(), streams, terms, rows, None)
    head = run_head(hidden_LH, weight_VH, streams, terms, rows, 16)
    eager = run_head(hidden_LH, weight_VH, streams, terms, rows, None)
    assert head[1].dtype == head[2].dtype == torch.bfloat16 and head[0].logprobs_L.dtype == torch.float32
    assert_near(head[0].logprobs_L, truth[0].logprobs_L)
    assert_near(head[0].entropy_L, truth[0].entropy_L)
    for index in (1, 2):  # only the last rounding to bf16 is left of the error
        error, eager_error = ((run[index].double() - truth[index]).norm() for run in (head, eager))
        assert error <= 0.003 * truth[index].norm() and error < eager_error
