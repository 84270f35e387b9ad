"""The actor in one process: which faults end a run, and which only skip an update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the stand-ins for CUDA would hide the GPU from other tests of this process", allow_module_level=True)

from actors import LEARNING_RATE, plan, same, step, weights

from icrl_megatron.actor.actor import Actor, InvariantError


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_ratios_of_the_first_update_are_1(make: Callable[..., Actor], precision: str) -> None:
    actor = make(precision)
    before = weights(actor)
    stats = step(actor)
    assert stats.skipped_updates == 0 and stats.metrics["ratio_deviation_max"] <= 1e-5
    assert stats.metrics["kl_old"] == pytest.approx(0.0, abs=1e-8) and stats.metrics["clip_low"] == 0
    assert not same(before, weights(actor))


@pytest.mark.parametrize("parameter", ["embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc2.weight"])
def test_a_weight_changed_after_scoring_ends_the_run(make: Callable[..., Actor], parameter: str) -> None:
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
    """It changes neither weights nor moments nor the step count, so the next update is that of an undamaged actor."""
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


def test_probes_change_no_weight_and_no_number_but_the_mismatch(make: Callable[..., Actor]) -> None:
    """Their sums are added to those of the plan's tokens."""
    alone, probed = make(updates_per_step=2), make(updates_per_step=2)
    for seed in range(3):
        probe = plan(probed, seed=100 + seed)
        batches = [batch for update in probe.updates for batch in update]
        batches[0].stale_L[:2] = True
        differences = [
            one.old_L.numpy() - batch.rollout_logprobs_L
            for of, update in zip(probed.score(probe), probe.updates, strict=True)
            for one, batch in zip(of, update, strict=True)
            if one.old_L is not None
        ]
        fresh = np.abs(np.concatenate([d[~b.stale_L] for d, b in zip(differences, batches, strict=True)]))
        of_step = plan(probed, seed)
        found = probed.mismatch(probe)
        stats = probed.train(of_step, probed.score(of_step), LEARNING_RATE, found)
        without = step(alone, seed)
        count = without.metrics["mismatched"]
        total = without.metrics["mismatch_abs"] * count + float(fresh.sum())
        assert stats.metrics["mismatched"] == count + len(fresh)
        assert stats.metrics["mismatch_abs"] == pytest.approx(total / (count + len(fresh)), rel=1e-6)
        assert stats.metrics["mismatch_max"] == pytest.approx(max(without.metrics["mismatch_max"], fresh.max()))
        other = {name: value for name, value in stats.metrics.items() if not name.startswith("mismatch")}
        assert other == {name: value for name, value in without.metrics.items() if not name.startswith("mismatch")}
        assert replace(stats, metrics={}) == replace(without, metrics={})
        assert same(weights(probed), weights(alone))


def test_an_update_whose_scores_are_not_finite_is_skipped(make: Callable[..., Actor]) -> None:
    """With several updates per step the plan is scored first, and the scores already contain NaN."""
    actor = make(updates_per_step=2)
    step(actor)
    weight = actor.rows[-1].param.data
    weight.flatten()[0] = math.nan
    before = weights(actor)
    stats = step(actor, seed=1)
    assert stats.skipped_updates == 2 and math.isnan(stats.grad_norm) and actor.optimizer.steps == 2
    assert stats.metrics["non_finite"] == stats.loss_tokens  # every token depends on the last weight
    after = weights(actor)
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_only_the_bad_update_of_a_step_is_skipped(make: Callable[..., Actor]) -> None:
    actor = make(updates_per_step=3)
    step(actor)
    of_step = plan(actor, seed=1)
    scored = actor.score(of_step)
    of_step.updates[1][0].advantages_L[:] = 3e38  # finite, but its gradient's norm is not
    stats = actor.train(of_step, scored, LEARNING_RATE)
    assert stats.skipped_updates == 1 and actor.optimizer.steps == 5
    assert all(t.isfinite().all() for t in weights(actor).values())


def test_weight_decay_shrinks_matrices_but_not_norms(make: Callable[..., Actor]) -> None:
    """The gradient is 0, so only weight decay changes a weight."""
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
def test_offloading_between_steps_does_not_change_the_results(make: Callable[..., Actor], precision: str) -> None:
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
