"""The simulation of rollouts and training, against what can be worked out by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from icrl_megatron.plan import async_plan, hardware, verl_async
from icrl_megatron.plan.async_simulation import (
    EnginePool,
    Group,
    LeadRule,
    SimulatedOutcome,
    SimulatedTurn,
    Trainer,
    simulate,
)
from icrl_megatron.plan.engine_speed import DecodeSpeed
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.utils.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import predict_async

H100 = hardware.GPUS["h100"]
ONE = EnginePool(1, DecodeSpeed(fixed_s=0.01))


def constant(tokens: float, episodes: int = 4, wait_s: float = 0.0) -> Callable[[int], Group]:
    return lambda number: ((SimulatedTurn(tokens, wait_s=wait_s),),) * episodes


def long_tailed(seed: int = 0) -> Callable[[int], Group]:
    def group(number: int) -> Group:
        rng = np.random.default_rng((seed, number))
        lengths, waits = rng.lognormal(4.0, 1.0, (2, 4, 2)) + 1.0
        return tuple(
            tuple(SimulatedTurn(float(n), 50.0, 10.0, float(w) / 50) for n, w in zip(*one, strict=True))
            for one in zip(lengths, waits, strict=True)
        )

    return group


def tailed(staleness: float, engines: int = 3, steps: int = 20, seed: int = 0) -> SimulatedOutcome:
    decode = DecodeSpeed(0.002, 1e-6, 1e-4, 0.005)
    setup = EnginePool(engines, decode, 1e-4, most_running=8, most_episodes=12, cache_tokens=500)
    return simulate(setup, Trainer(6, 1.0, 1e-4, 0.2), LeadRule(steps, staleness), long_tailed(seed))


def test_synchronous_step_is_rollout_plus_training_plus_sync() -> None:
    """100 iterations of 10 ms, then 3 s of training and 0.5 s of sync: the engine is idle outside its 1 s, and where
    both share the GPU it is idle during the sync alone."""
    out = simulate(ONE, Trainer(2, fixed_s=3.0, sync_s=0.5), LeadRule(6), constant(100))
    assert out.step_s(1) == pytest.approx(4.5)
    assert out.waited_s(1) == pytest.approx(1.0)
    assert out.idle(1, 1, 1, 1, colocated=True) == pytest.approx(0.5 / 4.5)
    assert out.idle(1, 1, 1, 1, colocated=False) == pytest.approx(1 - (1.0 + 3.0) / (2 * 4.5))


@pytest.mark.parametrize(("rollout_s", "step_s"), [(1.0, 3.0), (5.0, 5.0)])
def test_asynchronous_step_is_the_slower_of_both(rollout_s: float, step_s: float) -> None:
    """One group a step, one engine that runs one at a time: a pipeline of two stages."""
    setup = EnginePool(1, DecodeSpeed(fixed_s=0.01), most_running=1, most_episodes=1)
    out = simulate(setup, Trainer(1, fixed_s=3.0), LeadRule(20, 1), constant(100 * rollout_s, episodes=1))
    assert out.step_s(4) == pytest.approx(step_s)
    assert out.idle(4, 1, 1, 1, colocated=False) == pytest.approx(1 - (rollout_s + 3.0) / (2 * step_s))


@pytest.mark.parametrize(("tokens", "wait_s", "apart_s", "together_s"), [(200, 0.0, 7.0, 8.0), (90, 2.0, 7.0, 7.0)])
def test_engines_on_the_trainers_gpus_pause_while_it_trains(
    tokens: float, wait_s: float, apart_s: float, together_s: float
) -> None:
    """The first group ends after 1 s, and training takes 3 s. The second group's decoding pauses; its wait does not."""
    groups = [constant(100, episodes=1)(0), constant(tokens, episodes=1, wait_s=wait_s)(1)]
    for together, end_s in ((False, apart_s), (True, together_s)):
        trainer = Trainer(1, fixed_s=3.0, on_engine_gpus=together)
        assert simulate(ONE, trainer, LeadRule(2, 1), lambda n: groups[n]).steps[-1].end_s == pytest.approx(end_s)


def test_synchronous_step_waits_for_the_longest_episode() -> None:
    group = long_tailed()
    out = simulate(EnginePool(2, DecodeSpeed(fixed_s=0.01)), Trainer(5, fixed_s=1.0), LeadRule(3), group)
    for step, end in enumerate(out.steps):
        begun = out.steps[step - 1].end_s if step else 0.0
        episodes = [episode for n in range(5 * step, 5 * step + 5) for episode in group(n)]
        longest = max(sum(turn.tokens * 0.01 + turn.wait_s for turn in episode) for episode in episodes)
        assert end.end_s - begun == pytest.approx(longest + 1.0)


def test_requests_share_an_engine_and_wait_for_a_place() -> None:
    """Four requests of 100 iterations; an iteration takes 1 ms a request. Two at a time take the same 400 ms."""
    for most in (1, 2, 4):
        setup = EnginePool(1, DecodeSpeed(running_s=1e-3), most_running=most)
        out = simulate(setup, Trainer(1, fixed_s=1.0), LeadRule(3), constant(100))
        assert out.waited_s(1) == pytest.approx(0.4)
    small_cache = EnginePool(1, DecodeSpeed(fixed_s=0.01), cache_tokens=25.0)
    group = ((SimulatedTurn(100, context=10.0),),) * 4
    out = simulate(small_cache, Trainer(1, fixed_s=1.0), LeadRule(3), lambda n: group)
    assert out.waited_s(1) == pytest.approx(2.0)  # two at a time


def test_prefill_stops_decoding_and_a_flushed_cache_is_prefilled_again() -> None:
    setup = EnginePool(1, DecodeSpeed(fixed_s=0.01), prefill_token_s=1e-3)
    out = simulate(setup, Trainer(1, fixed_s=1.0), LeadRule(3), lambda n: ((SimulatedTurn(100, read=500.0),),))
    assert out.waited_s(1) == pytest.approx(1.5)
    # The second group runs during the step and is paused 0.5 s by the sync, then reads its 200 tokens again.
    group = [((SimulatedTurn(100, 200.0),),), ((SimulatedTurn(300, 200.0),),)]
    out = simulate(setup, Trainer(1, fixed_s=1.0, sync_s=0.5), LeadRule(2, 1), lambda n: group[n])
    assert out.steps[0].end_s == pytest.approx(2.5)
    assert out.steps[1].end_s == pytest.approx(3.0 + 0.5 + 0.2 + 1.0 + 0.5)


def test_parts_of_a_step_are_trained_on_as_soon_as_they_are_complete() -> None:
    """Groups end after 1 and 4 s; the first update overlaps the wait for the second."""
    group: Callable[[int], Group] = lambda n: ((SimulatedTurn(100 if n % 2 == 0 else 400),),)  # noqa: E731
    whole = simulate(ONE, Trainer(2, fixed_s=4.0), LeadRule(4), group)
    halves = simulate(ONE, Trainer(2, fixed_s=4.0, parts=2), LeadRule(4), group)
    assert whole.step_s(1) == pytest.approx(8.0)
    assert halves.step_s(1) == pytest.approx(4.0 + 2.0)


def test_staleness_0_drops_nothing_and_more_staleness_is_not_slower() -> None:
    outcomes = [tailed(k) for k in (0, 1, 2, 4, 8)]
    assert outcomes[0].dropped == 0
    seconds = [out.step_s(5) for out in outcomes]
    assert all(later <= 1.001 * earlier for earlier, later in pairwise(seconds))
    assert seconds[-1] < 0.8 * seconds[0]


def test_every_group_is_trained_dropped_or_open() -> None:
    outcomes = [tailed(k, seed=seed) for k in (0, 1, 3) for seed in range(3)]
    for out in outcomes:
        assert out.begun == out.trained + out.dropped + out.open
        assert out.trained == 6 * 20
        assert out.steps[-1].dropped == out.dropped
    assert sum(out.dropped for out in outcomes) > 0
    for k, out in zip((0, 1, 3), outcomes[::3], strict=True):
        assert max(step.stale for step in out.steps) <= k


def test_engines_are_never_busier_than_the_clock() -> None:
    for k in (0, 1, 4):
        out = tailed(k)
        for before, after in pairwise(out.steps):
            assert after.engines_s - before.engines_s <= 3 * (after.end_s - before.end_s) + 0.5
        assert 0 <= out.idle(5, 3, 1, 1, colocated=False) < 1


def test_the_same_seed_gives_the_same_run() -> None:
    assert tailed(2) == tailed(2)
    assert tailed(2) != tailed(2, seed=1)


def test_events_grow_with_the_episodes_not_faster() -> None:
    few, many = tailed(1, engines=2, steps=10), tailed(1, engines=2, steps=80)
    assert 7 < many.events / few.events < 9
    turns = many.begun * 4 * 2
    assert many.events < 6 * turns + 80 * 4


def test_a_shared_queue_keeps_engines_equally_full() -> None:
    """Groups of long and of short episodes in turn: dealt out, one of two engines has all long ones."""
    group: Callable[[int], Group] = lambda n: ((SimulatedTurn(100 + 300 * (n % 2)),),) * 4  # noqa: E731
    decode = DecodeSpeed(running_s=1e-3)
    dealt = simulate(EnginePool(2, decode), Trainer(8, fixed_s=1.0), LeadRule(3), group)
    queue = EnginePool(2, decode, most_episodes=4, shared_queue=True)
    shared = simulate(queue, Trainer(8, fixed_s=1.0), LeadRule(3), group)
    assert dealt.waited_s(1) == pytest.approx(16 * 0.4)
    assert shared.waited_s(1) < 0.8 * dealt.waited_s(1)


@pytest.mark.parametrize(
    ("setup", "trainer", "rule"),
    [
        (ONE, Trainer(4, parts=3), LeadRule(3)),
        (ONE, Trainer(4), LeadRule(0)),
        (EnginePool(1, DecodeSpeed()), Trainer(4), LeadRule(3)),
    ],
)
def test_settings_that_could_not_end_are_refused(setup: EnginePool, trainer: Trainer, rule: LeadRule) -> None:
    with pytest.raises(ValueError, match=r"steps=|groups=|positive time"):
        simulate(setup, trainer, rule, constant(10))


def test_the_8b_recipe_waits_less_with_more_staleness() -> None:
    settings = settings_module.load("qwen3_8b_alfworld_4xh100", [])
    found = async_plan.predict(settings, H100, (8,), split_on=8)
    assert [(one.staleness, one.engine_gpus == one.gpus) for one in found] == [
        *((0, True), (1, True), (2, True), (4, True)),
        *((1, False), (2, False), (4, False)),
    ]
    assert found[-1].step_s < found[0].step_s
    for one_mode in (found[:4], [found[0], *found[4:]]):
        assert all(later.waited_s <= earlier.waited_s + 1 for earlier, later in pairwise(one_mode))
    assert all(0 <= one.idle < 1 and one.dropped < 0.1 for one in found)
    with pytest.raises(ConfigError, match="frozen"):
        async_plan.predict(settings_module.load("qwen3_8b_alfworld_4xh100", ["rollout.critic=frozen"]), H100)
    screen = StringIO()
    async_plan.show(found, Console(file=screen, width=200))
    assert "simulated, not measured" in screen.getvalue()


def test_verls_published_row() -> None:
    """One of the rows that nothing was fitted to; `python -m icrl_megatron.plan.verl_async` prints all."""
    row = verl_async.ROWS[4]
    assert not row.fitted
    assert abs(verl_async.reproduce(row, steps=6, skip=2).step_error) < 0.15


def measured(seconds: dict[int, float], share: float) -> dict[str, Any]:
    """A result of bench_async: every episode has one request of 10 tokens; half of the waits are 0, half 2 s."""
    medians = {f"{case}, {k}": {"seconds_per_episode": seconds[k]} for case in predict_async.CASES for k in seconds}
    medians["no waits, 0"]["waited_share"] = share
    slow, fast = (json.dumps([[[10.0, wait_s]]] * 4) for wait_s in (2.0, 0.0))
    traces = {"waiting": [slow, fast] * 4, "no waits": [fast] * 8}
    return {"medians": medians, "traces": traces, "settings": {"steps": 24, "skip": 6, "interleave": False}}


def test_the_benchmark_is_predicted_from_its_synchronous_arm() -> None:
    """A step of 32 episodes takes 3.2 s, 0.8 of them rollout: without waits nothing but those can overlap."""
    result = measured(dict.fromkeys((0, 1, 2, 4), 0.1), 0.25)
    found = {(arm.case, arm.staleness): arm for arm in predict_async.predict(result)}
    assert found["no waits", 0].predicted_s == pytest.approx(0.1)
    assert found["no waits", 4].predicted_s == pytest.approx(0.075)
    assert found["no waits", 4].predicted == pytest.approx(1 / 0.75)
    assert found["waiting", 0].predicted_s == pytest.approx(0.1 + 2.0 / 32)
    assert found["waiting", 4].predicted_s == pytest.approx(0.075)
    result["settings"]["interleave"] = True
    found = {(arm.case, arm.staleness): arm for arm in predict_async.predict(result)}
    assert 0.075 < found["no waits", 4].predicted_s <= 0.1 + 1e-9
    assert found["waiting", 4].predicted_s < found["waiting", 0].predicted_s
    with pytest.raises(ValueError, match="bench_async"):
        predict_async.predict({"medians": {}})
    with pytest.raises(ValueError, match="below 1"):
        predict_async.predict(measured(dict.fromkeys((0, 1, 2, 4), 0.1), 1.5))
