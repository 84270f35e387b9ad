"""Every token of a micro-batch is on one context-parallel rank, with everything that belongs to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole_samples import Whole, packed

from icrl_megatron.data.context import BatchShare, owners, share
from icrl_megatron.settings.algo_schema import AlgoSettings
from icrl_megatron.types import MicroBatch
from icrl_megatron.utils.portions import Portion

OF_LOSS_TOKENS = (
    *("targets_L", "rollout_logprobs_L", "advantages_L", "coefficients_L", "calibrated_L", "same_prompt_L"),
    "sample_index_L",
)


def drawn(masks: list[list[bool]]) -> list[Whole]:
    """Samples with distinct tokens, with these loss masks."""
    made = []
    for i, mask in enumerate(masks):
        base, size = 100 * (i + 1), len(mask)
        prompt, ids = tuple(range(base, base + 1 + i % 5)), tuple(range(base + 50, base + 50 + size))
        logprobs = tuple(-0.01 * (base + j) for j in range(size))
        whole = Whole(f"t#{i}", "g", "attempt", 0, prompt, prompt, ids, tuple(mask), logprobs, i % 2 == 0, 0.5, i - 3.0)
        made.append(whole)
    return made


def test_a_rank_has_an_early_and_a_late_chunk_of_each_sequence() -> None:
    """Two sequences, of 8 and 4 tokens."""
    assert owners(np.array([0, 8, 12], dtype=np.int32), 2).tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0]
    assert owners(np.array([0, 8], dtype=np.int32), 4).tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"\[8, 6\] tokens: 2 ranks need multiples of 4"):
        owners(np.array([0, 8, 14], dtype=np.int32), 2)


@given(st.integers(1, 4), st.lists(st.integers(0, 99), max_size=20))
def test_portions_put_together_are_the_whole(ranks: int, drawn: list[int]) -> None:
    owner_N = np.array(drawn, dtype=np.int64) % ranks
    portions = [Portion.of(owner_N, ranks, rank) for rank in range(ranks)]
    values_N, longest = np.arange(len(drawn)), portions[0].longest
    padded = [np.pad(values_N[p.own], (0, longest - len(p.own)), constant_values=-1) for p in portions]
    for one in portions:
        assert np.concatenate(padded)[one.places].tolist() == values_N.tolist()


@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=20).filter(any), min_size=1, max_size=8),
    ranks=st.sampled_from([2, 3, 4]),
    budget=st.sampled_from([20, 10_000]),
)
def test_shares_have_every_token_once_with_its_position_and_label(masks, ranks: int, budget: int) -> None:
    plan = packed(drawn(masks), AlgoSettings(), micro_batch_tokens=budget, each=2 * ranks, align=4 * ranks)
    for batch in plan.updates[0]:
        shares = [share(batch, ranks, rank) for rank in range(ranks)]
        assert {len(s.tokens_T) for s in shares} == {len(batch.tokens_T) // ranks}
        for name in ("tokens_T", "positions_T"):
            assert _together(shares, batch, name, "tokens") == getattr(batch, name).tolist()
        for name in OF_LOSS_TOKENS:
            assert _together(shares, batch, name, "loss") == getattr(batch, name).tolist()
        for one in shares:
            # The position that predicts a loss token is on the same rank; the target need not be.
            at = batch.loss_index_L[one.loss.own]
            assert one.tokens_T[one.loss_index_L].tolist() == batch.tokens_T[at].tolist()
            assert one.positions_T[one.loss_index_L].tolist() == batch.positions_T[at].tolist()
            assert one.targets_L.tolist() == batch.tokens_T[at + 1].tolist()
    assert share(batch, 1, 0) is batch


def _together(shares: list[MicroBatch], batch: MicroBatch, name: str, of: str) -> list[float]:
    whole = np.full(len(getattr(batch, name)), -1.0)
    for one in shares:
        assert isinstance(one, BatchShare) and one.whole is batch
        whole[getattr(one, of).own] = getattr(one, name)
    return whole.astype(getattr(batch, name).dtype).tolist()
