"""Properties of packing for any number of replicas, token budget, alignment and order of samples."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole_samples import Whole, packed

from icrl_megatron.model.flops import SampleFlops
from icrl_megatron.settings.algo_schema import AlgoSettings, Calibration
from icrl_megatron.types import MicroBatch, StepPlan


@st.composite
def samples(draw: st.DrawFn, min_size: int = 1) -> list[Whole]:
    """Random samples with distinct ids, log-probs and prompts; some have no loss token."""
    shape = st.tuples(st.integers(1, 6), st.integers(0, 4), st.lists(st.booleans(), max_size=9))
    shapes = draw(st.lists(shape, min_size=min_size, max_size=14))
    made = []
    for i, (prompt, extra, mask) in enumerate(shapes):
        if i == 0:
            mask = [*mask, True]
        base = 1000 * (i + 1)
        made.append(
            Whole(
                sample_id=f"t/{i % 3}#{i}/0/attempt",
                group="g",
                role="attempt",
                round=0,
                behaviour_prompt_ids=tuple(range(base, base + prompt + extra)),
                train_prompt_ids=tuple(range(base, base + prompt)),
                response_ids=tuple(range(base + 500, base + 500 + len(mask))),
                loss_mask=tuple(mask),
                rollout_logprobs=tuple(-0.001 * (base + j) if m else 0.0 for j, m in enumerate(mask)),
                calibrated=extra > 0,
                reward=0.5,
                advantage=float(i) - 3.0,
            )
        )
    return made


MULTIPLES = [{"each": each, "align": align} for each, align in ((1, 1), (1, 2), (1, 4), (1, 16), (4, 4), (4, 16))]
layouts = st.fixed_dictionaries(
    {
        "micro_batch_tokens": st.integers(1, 60),
        "replicas": st.integers(1, 4),
        "flops": st.builds(
            SampleFlops,
            train=st.tuples(st.integers(1, 9), st.integers(0, 9)),
            behaviour=st.tuples(st.integers(0, 9), st.integers(0, 9)),
            loss_token=st.integers(0, 9),
        ),
    }
).flatmap(lambda layout: st.sampled_from(MULTIPLES).map(lambda multiples: layout | multiples))
algos = st.builds(
    AlgoSettings,
    loss_normalisation=st.sampled_from(["sequence_mean", "token_mean", "constant"]),
    constant_tokens=st.just(7),
    updates_per_step=st.integers(1, 3),
    calibration=st.builds(Calibration, denominator=st.sampled_from(["rollout", "recomputed"])),
)


def plans(items: list[Whole], algo: AlgoSettings, layout: dict[str, Any], prompt: str = "train") -> list[StepPlan]:
    return [packed(items, algo, replica=r, prompt=prompt, **layout) for r in range(layout["replicas"])]


def rows(plan: StepPlan, batch: MicroBatch) -> list[tuple[str, int, float, float, float, bool]]:
    """Every loss token of a micro-batch: sample id, target, rollout log-prob, advantage, coefficient, calibrated."""
    return [
        (plan.samples[i].sample_id, int(t), float(p), float(a), float(c), bool(w))
        for i, t, p, a, c, w in zip(
            batch.sample_index_L,
            batch.targets_L,
            batch.rollout_logprobs_L,
            batch.advantages_L,
            batch.coefficients_L,
            batch.calibrated_L,
            strict=True,
        )
    ]


@given(items=samples(), algo=algos, layout=layouts, random=st.randoms(), counted=st.integers(0, 4))
def test_layout_changes_neither_loss_tokens_nor_coefficients(items, algo, layout, random, counted) -> None:
    replicas = plans(items, algo, layout | {"counted": counted})
    random.shuffle(items)
    single = packed(items, algo, micro_batch_tokens=10_000, counted=counted)
    assert len({len(p.updates) for p in replicas}) == 1
    totals = len([s for s in items if s.loss_tokens]) + counted, sum(s.loss_tokens for s in items)
    assert {(p.global_samples, p.global_loss_tokens) for p in replicas} == {totals}
    shared = 0
    for u, reference in enumerate(single.updates):
        got = sorted(row for p in replicas for batch in p.updates[u] for row in rows(p, batch))
        assert got == sorted(row for batch in reference for row in rows(single, batch))
        members = len({row[0] for row in got})
        if algo.loss_normalisation == "token_mean":
            assert sum(row[4] for row in got) == pytest.approx(1.0, abs=1e-6)
            continue
        if algo.loss_normalisation == "constant":
            assert len({row[4] for row in got}) == 1
            samples = 1 / (7 * got[0][4])
        else:
            samples = members / sum(row[4] for row in got)
        assert samples == pytest.approx(round(samples), abs=1e-4)
        silent = round(samples) - members
        assert counted // len(single.updates) <= silent <= -(-counted // len(single.updates))
        shared += silent
    if algo.loss_normalisation != "token_mean":
        assert shared == counted

    by_id = {s.sample_id: s for s in items}
    everything = sorted(row[:4] for p in replicas for u in p.updates for b in u for row in rows(p, b))
    expected = [
        (s.sample_id, t, float(np.float32(lp)), s.advantage)
        for s in by_id.values()
        for t, m, lp in zip(s.response_ids, s.loss_mask, s.rollout_logprobs, strict=True)
        if m
    ]
    assert everything == sorted(expected)


@given(items=samples(), algo=algos, layout=layouts, prompt=st.sampled_from(["train", "behaviour"]))
def test_micro_batches_are_well_formed(items, algo, layout, prompt) -> None:
    by_id = {s.sample_id: s for s in items}
    for plan in plans(items, algo, layout, prompt):
        for batch in (b for u in plan.updates for b in u):
            tokens, cu = batch.tokens_T, batch.cu_seqlens
            assert len(tokens) % layout["align"] == 0
            assert cu[0] == 0
            assert cu[-1] == len(tokens) == len(batch.positions_T)
            assert (np.diff(cu) > 0).all()
            for start, end in pairwise(cu):
                assert batch.positions_T[start:end].tolist() == list(range(end - start))
            # The target is the token after the predicting position, in the same sequence.
            assert (tokens[batch.loss_index_L + 1] == batch.targets_L).all()
            sequence = np.searchsorted(cu, batch.loss_index_L, side="right")
            assert (sequence == np.searchsorted(cu, batch.loss_index_L + 1, side="right")).all()

            members = dict.fromkeys(batch.sample_index_L.tolist())
            for k, index in enumerate(members):
                s = by_id[plan.samples[index].sample_id]
                ids = [*(s.train_prompt_ids if prompt == "train" else s.behaviour_prompt_ids), *s.response_ids]
                padding = [0] * (-len(ids) % layout["each"])
                assert tokens[cu[k] : cu[k + 1]].tolist() == list(ids) + padding
            real = len(members) or 1  # a blank micro-batch holds one sequence without loss
            assert len(cu) - 1 - real in (0, 1)
            padding = cu[-1] - cu[real]
            assert padding < layout["align"]
            if len(members) > 1 and (prompt == "train" or algo.calibration.denominator == "recomputed"):
                assert cu[real] <= layout["micro_batch_tokens"] + (layout["each"] - 1) * real


@given(items=samples(), algo=algos, layout=layouts)
def test_train_and_behaviour_plans_have_the_same_loss_tokens(items, algo, layout) -> None:
    for train, behaviour in zip(plans(items, algo, layout), plans(items, algo, layout, "behaviour"), strict=True):
        assert train.samples == behaviour.samples
        for u, v in zip(train.updates, behaviour.updates, strict=True):
            assert [rows(train, b) for b in u] == [rows(behaviour, b) for b in v]


def one(sample_id: str, prompt: int, mask: tuple[bool, ...], advantage: float = 1.0) -> Whole:
    n = len(mask)
    ids = tuple(range(10, 10 + n))
    return Whole(
        sample_id, "g", "attempt", 0, (1,) * prompt, (1,) * prompt, ids, mask, (0.0,) * n, False, 1.0, advantage
    )


def test_packed_example() -> None:
    """Two sequences of 4 and 3 tokens and one padding token; the observation in the first has no loss."""
    two = [one("a", 1, (True, False, True)), one("b", 2, (True,), advantage=-2.0)]
    plan = packed(two, AlgoSettings(), micro_batch_tokens=100, align=8)
    (batch,) = plan.updates[0]
    assert batch.tokens_T.tolist() == [1, 10, 11, 12, 1, 1, 10, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8]
    assert batch.cu_seqlens.dtype == np.int32
    assert batch.loss_index_L.tolist() == [0, 2, 5]
    assert batch.targets_L.tolist() == [10, 12, 10]
    assert batch.coefficients_L.tolist() == [0.25, 0.25, 0.5]
    assert batch.advantages_L.tolist() == [1.0, 1.0, -2.0]
    assert batch.sample_index_L.tolist() == [0, 0, 1]


def test_replica_without_samples_gets_a_blank_micro_batch() -> None:
    shares = [
        packed([one("a", 3, (True,))], AlgoSettings(), micro_batch_tokens=8, align=4, replica=r, replicas=2)
        for r in (0, 1)
    ]
    blank = shares[1].updates[0][0]
    assert shares[1].samples == ()
    assert blank.cu_seqlens.tolist() == [0, 2, 4]
    assert len(blank.targets_L) == len(blank.coefficients_L) == 0
    assert shares[1].global_samples == 1
    assert len(shares[0].updates[0][0].targets_L) == 1


def test_invalid_samples_are_rejected() -> None:
    good = one("a", 2, (True, True))
    for bad, message in [
        (one("b", 0, (True,)), "'b' has an empty prompt"),
        (replace(good, sample_id="c", rollout_logprobs=(0.0,)), "'c'.*2, 2, 2, 2, 1, 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed([good, bad], AlgoSettings(), micro_batch_tokens=8)
    with pytest.raises(ValueError, match="each id once"):
        packed([good, replace(good, advantage=2.0)], AlgoSettings(), micro_batch_tokens=8)
    with pytest.raises(ValueError, match="loss token"):
        packed([one("d", 2, (False,))], AlgoSettings(), micro_batch_tokens=8)
