"""The actor in one process: what must stop a run, and what must only be skipped."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the stand-ins for CUDA would hide the GPU from other tests of this process", allow_module_level=True)

from actors import LEARNING_RATE, plan, same, step, weights

from icrl_megatron.actor.actor import Actor, InvariantError


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_step_sees_ratio_one(make: Callable[..., Actor], precision: str) -> None:
    actor = make(precision)
    before = weights(actor)
    stats = step(actor)
    assert stats.skipped_updates == 0 and stats.metrics["ratio_deviation_max"] <= 1e-5
    assert stats.metrics["kl_old"] == pytest.approx(0.0, abs=1e-8) and stats.metrics["clip_low"] == 0
    assert not same(before, weights(actor))


@pytest.mark.parametrize("parameter", ["embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc2.weight"])
def test_a_weight_that_changed_after_scoring_ends_the_run(make: Callable[..., Actor], parameter: str) -> None:
    actor = make()
    of_step = plan(actor)
    scored = actor.score(of_step)
    (row,) = [r for r in actor.rows if r.name == parameter]
    row.param.data[3] += 0.5
    after_damage = weights(actor)
    with pytest.raises(InvariantError, match="a ratio of the unchanged policy deviates from 1 by"):
        actor.train(of_step, scored, LEARNING_RATE)
    assert same(after_damage, weights(actor)) and actor.optimizer.steps == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_and_counted(make: Callable[..., Actor], value: float) -> None:
    """Weights, moments and the step count stay; with the weight restored the next update is as if nothing had been."""
    actor, undisturbed = make(), make()
    for a in (actor, undisturbed):
        step(a)
    weight = actor.rows[-1].param.data
    intact = float(weight.flatten()[0])
    before = weights(actor)
    weight.flatten()[0] = value
    stats = step(actor, seed=1)
    assert stats.skipped_updates == 1 and actor.optimizer.steps == 1
    assert not math.isfinite(stats.grad_norm) or stats.metrics["non_finite"] > 0
    weight.flatten()[0] = intact
    assert same(before, weights(actor))
    for a in (actor, undisturbed):
        assert step(a, seed=2).skipped_updates == 0
    assert same(weights(actor), weights(undisturbed))


def test_an_update_whose_scores_are_not_finite_is_skipped(make: Callable[..., Actor]) -> None:
    """With several updates a step the plan is scored first, and a broken policy shows there."""
    actor = make(updates_per_step=2)
    step(actor)
    weight = actor.rows[-1].param.data
    weight.flatten()[0] = math.nan
    before = weights(actor)
    stats = step(actor, seed=1)
    assert stats.skipped_updates == 2 and math.isnan(stats.grad_norm) and actor.optimizer.steps == 2
    assert stats.metrics["non_finite"] == stats.loss_tokens  # of the last weight every token depends
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before.values(), weights(actor).values(), strict=True)
    )


def test_only_the_bad_update_of_a_step_is_skipped(make: Callable[..., Actor]) -> None:
    actor = make(updates_per_step=3)
    step(actor)
    of_step = plan(actor, seed=1)
    scored = actor.score(of_step)
    of_step.updates[1][0].advantages_L[:] = 3e38  # finite, but its gradient's norm is not
    stats = actor.train(of_step, scored, LEARNING_RATE)
    assert stats.skipped_updates == 1 and actor.optimizer.steps == 5
    assert all(t.isfinite().all() for t in weights(actor).values())


def test_norms_do_not_decay(make: Callable[..., Actor]) -> None:
    """At a gradient of 0 only weight decay moves a weight: matrices shrink by lr * decay, norms stay."""
    actor = make()
    step(actor)
    for state in actor.optimizer.distributed.optimizer.state.values():
        state["exp_avg"].zero_()
    before = weights(actor)
    of_step = plan(actor)
    for batch in of_step.updates[0]:
        batch.advantages_L[:] = 0.0
    actor.train(of_step, actor.score(of_step), LEARNING_RATE)
    shrunk = 1.0 - LEARNING_RATE * actor.settings.optim.weight_decay
    for name, after in weights(actor).items():
        torch.testing.assert_close(after, before[name] * (1.0 if after.ndim == 1 else shrunk))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_given_up_between_steps_changes_nothing(make: Callable[..., Actor], precision: str) -> None:
    kept, offloaded = make(precision), make(precision)
    offloaded.offload.what = "all"
    gradients = [buffer.grad_data.untyped_storage() for buffer in offloaded.wrapped.buffers]
    for seed in range(3):
        offloaded.offload.restore()
        assert step(offloaded, seed) == step(kept, seed)
        offloaded.offload.release()
        offloaded.offload.release()
        assert [storage.nbytes() for storage in gradients] == [0] * len(gradients)
    offloaded.offload.restore()
    assert all(torch.equal(a, b) for a, b in zip(offloaded.model.parameters(), kept.model.parameters(), strict=True))
