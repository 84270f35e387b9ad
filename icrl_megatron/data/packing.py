"""Samples -> StepPlan: optimizer updates, replicas, packed micro-batches, and global coefficients of loss tokens.

Invariants (tests/cpu/test_packing.py):
- an update's samples depend only on the step's samples, not on the replicas, the budget or the order of arrival;
- the coefficients contain the whole normalizer, so the loss and its gradient are plain sums; those of an update sum to
  1 over all replicas, except with loss_normalisation=constant or samples that are only counted;
- every loss token of the step appears exactly once over all replicas, updates and micro-batches;
- the "train" and the "behaviour" plan of the same samples have the same micro-batches and the same loss tokens in the
  same order. Only the prompts differ, so per-token results of the two plans can be compared one to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from icrl_megatron.data.balance import Sizes, place
from icrl_megatron.model.flops import SampleFlops
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.types import Ids, IntArray, MicroBatch, Sample, StepPlan
from icrl_megatron.utils.errors import ConfigError

Prompt = Literal["train", "behaviour"]
NORMALISATIONS = ("sequence_mean", "token_mean", "constant")
BLANK_TOKENS = 2
BY_TOKENS = SampleFlops(train=(1, 0), behaviour=(0, 0), loss_token=0)
"""Costs a sample as many FLOPs as it has tokens. On one replica all costs give the same plan."""


def pack(
    samples: Iterable[Sample],
    settings: AlgoSettings,
    *,
    micro_batch_tokens: int,
    align: int = 1,
    replica: int = 0,
    replicas: int = 1,
    prompt: Prompt = "train",
    counted: int = 0,
    flops: SampleFlops = BY_TOKENS,
) -> StepPlan:
    """The plan of one data-parallel replica, from the samples of the *whole* step (the same on every rank).

    `micro_batch_tokens` is the budget of a micro-batch, without alignment padding; a longer sequence gets its own
    micro-batch. `align`: every micro-batch is padded to a multiple of it by one sequence without loss tokens. Samples
    without loss tokens are left out, also from the normalizer. A replica with no samples in an update gets one blank
    micro-batch, so that every rank takes part in the collectives. There are never more updates than samples. `counted`:
    samples without loss that count in the normalizer all the same; updates share them evenly. `flops`: what the
    replicas' shares are balanced by.

    Raises ConfigError on an unknown normalization, ValueError on samples that cannot be packed (an empty prompt,
    streams of unequal length, a duplicate sample_id, or no loss token in the whole step).
    """
    if settings.loss_normalisation not in NORMALISATIONS:
        raise ConfigError(
            f"algo.loss_normalisation is {settings.loss_normalisation!r}: choose one of {', '.join(NORMALISATIONS)}."
        )
    trained = sorted((s for s in samples if True in s.loss_mask), key=attrgetter("sample_id"))
    if not trained:
        raise ValueError("No sample of this step has a loss token: nothing can be packed.")
    for sample in trained:
        _check(sample)
    sizes = Sizes.of(trained)
    placement = place(sizes, settings.updates_per_step, flops, replicas)
    lengths_S = _packed_lengths(sizes, settings)

    own: list[Sample] = []
    updates = []
    for number in range(placement.updates):
        silent = counted * (number + 1) // placement.updates - counted * number // placement.updates
        of_token_S = np.zeros(len(trained))
        in_update_S = placement.update_S == number
        of_token_S[in_update_S] = _coefficients(sizes.loss_S[in_update_S], silent, settings)
        members = placement.members(number, replica)
        micro_batches = []
        for places in first_fit(lengths_S[members], micro_batch_tokens):
            chosen = members[places]
            batch = [trained[i] for i in chosen.tolist()]
            micro_batches.append(_micro_batch(batch, len(own), of_token_S[chosen], align, prompt))
            own += batch
        updates.append(tuple(micro_batches) or (_micro_batch([], 0, np.zeros(0), align, prompt),))
    return StepPlan(
        samples=tuple(own),
        updates=tuple(updates),
        global_samples=len(trained) + counted,
        global_loss_tokens=int(sizes.loss_S.sum()),
    )


def _coefficients(loss_S: IntArray, silent: int, settings: AlgoSettings) -> npt.NDArray[np.float64]:
    """c_t [S] of the tokens of all samples of an update, over all replicas, from the samples' loss tokens. `silent` is
    the number of samples that are only counted.

    sequence_mean: 1 / (samples * loss tokens of the sample). token_mean: 1 / loss tokens of the update. constant:
    1 / (samples * algo.constant_tokens), which weighs tokens of short and long replies equally (Dr. GRPO,
    arXiv 2503.20783).
    """
    samples = len(loss_S) + silent
    if settings.loss_normalisation == "token_mean":
        return np.full(len(loss_S), 1.0 / int(loss_S.sum()))
    if settings.loss_normalisation == "constant":
        assert settings.constant_tokens is not None  # checked in run/checks.py
        return np.full(len(loss_S), 1.0 / (samples * settings.constant_tokens))
    return 1.0 / (samples * loss_S)


def _packed_lengths(sizes: Sizes, settings: AlgoSettings) -> IntArray:
    """Tokens [S] that a sample takes in a micro-batch."""
    if settings.calibration.enabled and settings.calibration.denominator == "recomputed":
        # The trainer then reads both prompts, and the same split into micro-batches must fit both.
        return np.maximum(sizes.train_S, sizes.behaviour_S)
    return sizes.train_S


def first_fit(lengths_S: IntArray, budget: int) -> list[list[int]]:
    """First fit, longest first (ties: in their order): each sequence goes into the first micro-batch with room for it,
    of at most `budget` tokens or of one longer sequence. Returns indices into `lengths_S`, micro-batch by micro-batch.

    Time is O(S log S): a tree over the micro-batches, whose inner nodes hold the most room below them, finds the first
    one with enough. It has a leaf for each that can be needed. All but one of them are more than half full at the end,
    so 2 x tokens / budget + 1 are enough.
    """
    order = np.argsort(-lengths_S, kind="stable")
    needs = np.minimum(lengths_S[order], budget)  # a longer one needs an empty micro-batch, and leaves no room in it
    leaves = 1 << max(0, min(len(needs), 2 * int(needs.sum()) // budget + 1) - 1).bit_length()
    room = [budget] * (2 * leaves)  # node n has the children 2n and 2n + 1
    batches: list[list[int]] = [[] for _ in range(leaves)]
    for index, need in zip(order.tolist(), needs.tolist(), strict=True):
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < need
        batches[node - leaves].append(index)
        room[node] -= need
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return [batch for batch in batches if batch]


def _micro_batch(
    samples: Sequence[Sample],
    first_index: int,
    coefficients_S: npt.NDArray[np.float64],
    align: int,
    prompt: Prompt,
) -> MicroBatch:
    """Packs the sequences end to end. The token at response position j is predicted at prompt_len + j - 1."""
    prompts: list[Ids] = [s.train_prompt_ids if prompt == "train" else s.behaviour_prompt_ids for s in samples]
    prompt_S = np.fromiter(map(len, prompts), dtype=np.int64, count=len(samples))
    response_S = np.fromiter((len(s.response_ids) for s in samples), dtype=np.int64, count=len(samples))
    lengths = (prompt_S + response_S) if samples else np.array([BLANK_TOKENS])
    if padding := -int(lengths.sum()) % align:
        lengths = np.append(lengths, padding)
    ends = np.cumsum(lengths)
    starts = ends - lengths

    tokens_T = np.zeros(int(ends[-1]), dtype=np.int64)
    ids = chain.from_iterable((*p, *s.response_ids) for p, s in zip(prompts, samples, strict=True))
    filled = int((prompt_S + response_S).sum())
    tokens_T[:filled] = np.fromiter(ids, dtype=np.int64, count=filled)

    # First over the R response tokens, then only those with loss.
    mask_R = _joined(np.bool_, (s.loss_mask for s in samples))
    sample_L = np.repeat(np.arange(len(samples)), response_S)[mask_R]
    response_starts = np.cumsum(response_S) - response_S
    shift_S = starts[: len(samples)] + prompt_S - response_starts
    targets_at = np.flatnonzero(mask_R) + shift_S[sample_L]
    return MicroBatch(
        tokens_T=tokens_T,
        positions_T=np.arange(len(tokens_T)) - np.repeat(starts, lengths),
        cu_seqlens=np.append(starts, len(tokens_T)).astype(np.int32),
        loss_index_L=targets_at - 1,
        targets_L=tokens_T[targets_at],
        rollout_logprobs_L=_joined(np.float32, (s.rollout_logprobs for s in samples))[mask_R],
        advantages_L=np.array([s.advantage for s in samples], dtype=np.float32)[sample_L],
        coefficients_L=coefficients_S.astype(np.float32)[sample_L],
        calibrated_L=np.array([s.calibrated for s in samples], dtype=np.bool_)[sample_L],
        same_prompt_L=np.array([s.train_prompt_ids == s.behaviour_prompt_ids for s in samples], dtype=np.bool_)[
            sample_L
        ],
        sample_index_L=sample_L + first_index,
    )


def _joined(dtype: type[Any], parts: Iterable[Sequence[float]]) -> npt.NDArray[Any]:
    joined: npt.NDArray[Any] = np.fromiter(chain.from_iterable(parts), dtype=dtype)
    return joined


def _check(sample: Sample) -> None:
    if not sample.train_prompt_ids or not sample.behaviour_prompt_ids:
        raise ValueError(f"Sample {sample.sample_id!r} has an empty prompt: nothing predicts its first token.")
    if not len(sample.response_ids) == len(sample.loss_mask) == len(sample.rollout_logprobs):
        raise ValueError(
            f"Sample {sample.sample_id!r}: {len(sample.response_ids)} response ids, {len(sample.loss_mask)} mask "
            f"values and {len(sample.rollout_logprobs)} log-probs must be equally many."
        )
