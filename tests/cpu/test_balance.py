"""Placement of samples on replicas and in micro-batches: complete, deterministic, within bounds, and fast enough.

`greedy` and `fill` are the definitions, searched in the plainest way; the package must give the same answers.
"""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.data import balance, packing
from icrl_megatron.data.balance import Sizes, assign, imbalance, place, split_updates
from icrl_megatron.data.packing import BY_TOKENS, first_fit
from icrl_megatron.model.flops import Passes, SampleFlops
from icrl_megatron.plan.models import PUBLISHED
from icrl_megatron.settings.algo_schema import AlgoSettings, Calibration
from icrl_megatron.settings.schema import ActorSettings, Settings
from icrl_megatron.types import IntArray, Sample

columns = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(lambda c: np.array(c, dtype=np.int64))


def greedy(flops_S: IntArray, replicas: int) -> list[int]:
    load, count = [0] * replicas, [0] * replicas
    chosen = [0] * len(flops_S)
    for i in sorted(range(len(flops_S)), key=lambda i: (-flops_S[i], i)):
        chosen[i] = min(range(replicas), key=lambda r: (load[r], count[r], r))
        load[chosen[i]] += int(flops_S[i])
        count[chosen[i]] += 1
    return chosen


def fill(lengths_S: IntArray, budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths_S)), key=lambda i: (-lengths_S[i], i)):
        slot = next((b for b, left in enumerate(free) if lengths_S[i] <= left), len(batches))
        if slot == len(batches):
            batches.append([])
            free.append(budget)
        batches[slot].append(i)
        free[slot] -= int(lengths_S[i])
    return batches


def sizes_of(count: int, seed: int = 0, mean: float = 2000.0) -> Sizes:
    """A step's sizes: log-normal lengths up to 16384, prompts that differ between the roles."""
    draw = np.random.default_rng(seed)
    response_S = np.clip(draw.lognormal(np.log(mean) - 0.5, 1.0, count), 8, 15_000).astype(np.int64)
    prompt_S, critique_S = (draw.integers(1, 700, count) for _ in range(2))
    ids = tuple(sorted(f"alfworld/train/{i // 4}#{i % 4}/0/attempt" for i in range(count)))
    loss_S = np.maximum(1, response_S * draw.integers(1, 9, count) // 9)
    return Sizes(ids, prompt_S + response_S, prompt_S + critique_S + response_S, loss_S)


@given(flops_S=columns, replicas=st.integers(1, 9))
def test_the_costliest_sample_goes_to_the_replica_with_the_least_work(flops_S, replicas) -> None:
    found_S = assign(flops_S, replicas)
    assert found_S.tolist() == greedy(flops_S, replicas)
    load_R = np.bincount(found_S, weights=flops_S, minlength=replicas)
    assert load_R.max() <= flops_S.sum() / replicas + flops_S.max()
    assert imbalance(flops_S, found_S, replicas) == pytest.approx(load_R.max() * replicas / flops_S.sum())


@given(lengths_S=columns, budget=st.integers(1, 80))
def test_each_sequence_goes_into_the_first_micro_batch_with_room(lengths_S, budget) -> None:
    batches = first_fit(lengths_S, budget)
    assert batches == fill(lengths_S, budget)
    assert sorted(chain.from_iterable(batches)) == list(range(len(lengths_S)))
    assert all(len(batch) == 1 or lengths_S[batch].sum() <= budget for batch in batches)


def test_first_fit_of_nothing_is_nothing() -> None:
    assert first_fit(np.zeros(0, dtype=np.int64), 16) == []


@given(count=st.integers(1, 60), updates=st.integers(1, 8), replicas=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_sample_is_placed_once(count, updates, replicas, seed) -> None:
    """No update depends on the replicas, and none is without samples."""
    sizes = sizes_of(count, seed)
    placement = place(sizes, updates, BY_TOKENS, replicas)
    shares = [placement.members(u, r).tolist() for u in range(placement.updates) for r in range(replicas)]
    assert sorted(chain.from_iterable(shares)) == list(range(count))
    assert all(share == sorted(share) for share in shares)
    assert placement.updates == min(updates, count)
    assert (placement.update_S == place(sizes, updates, BY_TOKENS, 1).update_S).all()
    in_update_U = np.bincount(placement.update_S)
    assert in_update_U.max() - in_update_U.min() <= 1
    parts = split_updates(sizes.sample_ids, updates)
    expected = [np.flatnonzero(placement.update_S == u).tolist() for u in range(placement.updates)]
    assert [part.tolist() for part in parts] == expected


def sample(sample_id: str, prompt: int, critique: int, mask: tuple[bool, ...]) -> Sample:
    lengths = prompt + critique, prompt, len(mask), sum(mask)
    return Sample(sample_id, "g", "attempt", 0, *lengths, critique == 0, False, 0.5)


def test_sizes_are_those_of_the_samples() -> None:
    sizes = Sizes.of([sample("a", 3, 2, (True, False, True)), sample("b", 1, 0, (True,))])
    assert sizes.sample_ids == ("a", "b")
    assert [c.tolist() for c in (sizes.train_S, sizes.behaviour_S, sizes.loss_S)] == [[6, 2], [8, 2], [2, 1]]
    assert sizes.flops_S(SampleFlops((1, 0), (0, 2), 10)).tolist() == [6 + 128 + 20, 2 + 8 + 10]
    for wrong, message in (
        ([sample("b", 1, 0, (True,)), sample("a", 1, 0, (True,))], "'a' follows 'b'"),
        ([sample("a", 1, 0, (True,))] * 2, "each id once"),
        ([sample("a", 1, 0, (False,))], "without loss tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            Sizes.of(wrong)
    with pytest.raises(ValueError, match="replicas is 0"):
        assign(sizes.train_S, 0)


@given(order=st.permutations(range(24)), replicas=st.integers(1, 5), updates=st.integers(1, 3))
def test_ranks_that_saw_the_episodes_in_any_order_plan_the_same_step(order, replicas, updates) -> None:
    draw = random.Random(3)
    made = [sample(f"t#{i:02}", draw.randint(1, 9), i % 3, (True,) * draw.randint(1, 9)) for i in range(24)]
    algo = AlgoSettings(updates_per_step=updates)
    given_to_all: dict[str, Any] = {
        "micro_batch_tokens": 30,
        "replicas": replicas,
        "flops": SampleFlops((3, 1), (0, 0), 2),
    }
    placed: list[int] = []
    for r in range(replicas):
        mine = packing.lay_out(made, algo, replica=r, **given_to_all)
        theirs = packing.lay_out([made[i] for i in order], algo, replica=r, **given_to_all)
        assert mine.samples == theirs.samples == tuple(made)
        for name in ("replica_S", "coefficients_S"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
        bins, same = ([batch.tolist() for batch in chain.from_iterable(of.updates)] for of in (mine, theirs))
        assert bins == same
        placed += chain.from_iterable(bins)
    assert sorted(placed) == list(range(24))


@pytest.mark.parametrize(("replicas", "updates"), [(256, 1), (1024, 1), (1024, 2)])
def test_replicas_of_a_step_of_200_million_tokens_differ_by_two_percent_at_most(replicas: int, updates: int) -> None:
    sizes = sizes_of(110_000)
    assert sizes.train_S.sum() > 200e6 and sizes.train_S.max() > 15_000
    flops = SampleFlops.of_passes(PUBLISHED["Qwen3-8B"], Passes(1, 0), "full", 1)
    placement, flops_S = place(sizes, updates, flops, replicas), sizes.flops_S(flops)
    for u in range(updates):
        members = placement.update_S == u
        assert imbalance(flops_S[members], placement.replica_S[members], replicas) <= 1.005


def test_flops_of_a_sample_are_the_planners() -> None:
    """Worked out by hand for a model of 2 layers, and for each pass that the settings add."""
    shape = PUBLISHED["Qwen3-0.6B"]
    layer = 1024 * (2 * 2048 + 2 * 1024) + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    token, square, head = 2 * 28 * layer, 2 * 28 * 2048, 2 * 151_936 * 1024

    def flops(algo: AlgoSettings, recompute: str = "none", pipeline: int = 1) -> SampleFlops:
        actor = ActorSettings(recompute=recompute, pipeline_parallel=pipeline)
        return SampleFlops.of(shape, Settings(algo=algo, actor=actor))

    paper = AlgoSettings()
    assert flops(paper) == SampleFlops((3 * token, 3 * square), (0, 0), 3 * head)
    assert flops(paper, "selective") == SampleFlops((3 * token, 4 * square), (0, 0), 3 * head)
    assert flops(paper, "full", 4) == SampleFlops((4 * token, 4 * square), (0, 0), 12 * head)
    scored = AlgoSettings(updates_per_step=2, kl_coef=0.1, calibration=Calibration(denominator="recomputed"))
    assert flops(scored) == SampleFlops((5 * token, 5 * square), (token, square), 6 * head)
    (cost,) = flops(scored).each(*(np.array([n]) for n in (1000, 1200, 300))).tolist()
    assert cost == 5 * (token * 1000 + square * 1000**2) + token * 1200 + square * 1200**2 + 6 * head * 300


def lines(run: Callable[[], object]) -> int:
    """Lines of balance and packing that `run` executes: their time, whatever else the machine does."""
    files, count = {balance.__file__, packing.__file__}, 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def test_twice_the_samples_take_little_more_than_twice_the_time() -> None:
    """For any number of replicas. O(samples x replicas) and O(samples^2) would take four times as long."""
    small, large = sizes_of(2000), sizes_of(4000)
    for work in (
        lambda sizes, grow: place(sizes, 2, BY_TOKENS, 32 * grow),
        lambda sizes, _: first_fit(sizes.train_S, 16_384),
    ):
        once, twice = lines(lambda: work(small, 1)), lines(lambda: work(large, 2))  # noqa: B023
        assert once > 2000 and twice <= 2.5 * once


def test_the_benchmark_measures_a_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    bench = importlib.import_module("bench_balance")
    bench.main(tokens=4e5, mean=1000.0, replicas=[1, 8], updates=2, rounds=1)
    assert "samples of 200 episodes" in (said := capsys.readouterr().out) and "bars held" in said
    monkeypatch.setattr(bench, "IMBALANCE_BAR", 1.0)
    with pytest.raises(bench.typer.Exit):
        bench.main(tokens=2e5, mean=5000.0, replicas=[16], rounds=1)
    assert "MISSED" in capsys.readouterr().out
