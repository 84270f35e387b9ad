"""Samples -> SampleLayout -> StepPlan: optimizer updates, replicas, packed micro-batches, and global coefficients of
loss tokens. The layout needs only headers; the plan, the tokens of one replica's samples.

Invariants (tests/cpu/test_packing.py):
- an update's samples depend only on the step's samples, not on the replicas, the budget or the order of arrival;
- the coefficients contain the whole normalizer, so the loss and its gradient are plain sums; those of an update sum to
  1 over all replicas, except with loss_normalisation=constant or samples that are only counted;
- every loss token of the step appears exactly once over all replicas, updates and micro-batches;
- the "train" and the "behaviour" plan of the same samples have the same micro-batches and the same loss tokens in the
  same order. Only the prompts differ, so per-token results of the two plans can be compared one to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import numpy as np
import numpy.typing as npt

from icrl_megatron.data.balance import Sizes, place
from icrl_megatron.model.flops import SampleFlops
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.types import IdArray, IntArray, MicroBatch, Sample, SampleTokens, StepPlan, joined

Prompt = Literal["train", "behaviour"]
BLANK_TOKENS = 2
BY_TOKENS = SampleFlops(train=(1, 0), behaviour=(0, 0), loss_token=0)
"""Costs a sample as many FLOPs as it has tokens. On one replica all costs give the same plan."""


@dataclass(frozen=True)
class SampleLayout:
    """Which replica trains on which sample of a step, and the micro-batches of one replica, from headers alone.

    Example: SampleLayout(samples, replica_S=[0, 1], updates=(([0],),), coefficients_S=[0.5, 0.5], 2, 40)
    """

    samples: tuple[Sample, ...]
    """All samples with loss tokens, in ascending order of sample_id: the same on every rank."""
    replica_S: IntArray
    """The replica that trains on each of them."""
    updates: tuple[tuple[IntArray, ...], ...]
    """This replica's micro-batches by update: indices into `samples`."""
    coefficients_S: npt.NDArray[np.float64]
    """c_t of the loss tokens of each sample."""
    global_samples: int
    global_loss_tokens: int


def lay_out(
    samples: Iterable[Sample],
    settings: AlgoSettings,
    *,
    micro_batch_tokens: int,
    replica: int = 0,
    replicas: int = 1,
    counted: int = 0,
    flops: SampleFlops = BY_TOKENS,
) -> SampleLayout:
    """The layout of one data-parallel replica, from the headers of the *whole* step (the same on every rank).

    `micro_batch_tokens` is the budget of a micro-batch, without alignment padding; a longer sequence gets its own
    micro-batch. Samples without loss tokens are left out, also from the normalizer. There are never more updates than
    samples. `counted`: samples without loss that count in the normalizer all the same; updates share them evenly.
    `flops`: what the replicas' shares are balanced by.

    Raises ValueError on samples that cannot be packed (an empty prompt, a duplicate sample_id, or no loss token in the
    whole step).
    """
    trained = sorted((s for s in samples if s.loss_tokens), key=attrgetter("sample_id"))
    if not trained:
        raise ValueError("No sample of this step has a loss token: nothing can be packed.")
    for sample in trained:
        _check(sample)
    sizes = Sizes.of(trained)
    placement = place(sizes, settings.updates_per_step, flops, replicas)
    lengths_S = _packed_lengths(sizes, settings)

    coefficients_S = np.zeros(len(trained))
    updates = []
    for number in range(placement.updates):
        silent = counted * (number + 1) // placement.updates - counted * number // placement.updates
        in_update_S = placement.update_S == number
        coefficients_S[in_update_S] = _coefficients(sizes.loss_S[in_update_S], silent, settings)
        members = placement.members(number, replica)
        updates.append(tuple(members[places] for places in first_fit(lengths_S[members], micro_batch_tokens)))
    return SampleLayout(
        samples=tuple(trained),
        replica_S=placement.replica_S,
        updates=tuple(updates),
        coefficients_S=coefficients_S,
        global_samples=len(trained) + counted,
        global_loss_tokens=int(sizes.loss_S.sum()),
    )


def pack(
    layout: SampleLayout, tokens: Mapping[str, SampleTokens], *, align: int = 1, each: int = 1, prompt: Prompt = "train"
) -> StepPlan:
    """The plan of the replica of a layout, with the tokens of its samples by sample_id.

    `each`: every sequence is padded to a multiple of it at its end. `align`, a multiple of `each`: every micro-batch is
    padded to a multiple of it by one sequence without loss tokens. A replica with no samples in an update gets one
    blank micro-batch, so that every rank takes part in the collectives. Raises ValueError if tokens do not have the
    lengths of their header.
    """
    own: list[Sample] = []
    updates = []
    for bins in layout.updates:
        micro_batches = []
        for chosen in bins:
            batch = [layout.samples[i] for i in chosen.tolist()]
            for sample in batch:
                _check_lengths(sample, tokens[sample.sample_id])
            coefficients_S, multiples = layout.coefficients_S[chosen], (each, align)
            micro_batches.append(_micro_batch(batch, tokens, len(own), coefficients_S, multiples, prompt))
            own += batch
        updates.append(tuple(micro_batches) or (_micro_batch([], {}, 0, np.zeros(0), (each, align), prompt),))
    return StepPlan(
        samples=tuple(own),
        updates=tuple(updates),
        global_samples=layout.global_samples,
        global_loss_tokens=layout.global_loss_tokens,
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
    tokens: Mapping[str, SampleTokens],
    first_index: int,
    coefficients_S: npt.NDArray[np.float64],
    multiples: tuple[int, int],
    prompt: Prompt,
) -> MicroBatch:
    """Packs the sequences end to end, padded to `multiples` of a sequence and of the micro-batch. The token at response
    position j is predicted at prompt_len + j - 1."""
    each, align = multiples
    parts = [tokens[s.sample_id] for s in samples]
    prompts: list[IdArray] = [t.train_prompt_ids if prompt == "train" else t.behaviour_prompt_ids for t in parts]
    prompt_S = np.fromiter(map(len, prompts), dtype=np.int64, count=len(samples))
    response_S = np.fromiter((s.response_tokens for s in samples), dtype=np.int64, count=len(samples))
    given_S = prompt_S + response_S
    lengths = given_S if samples else np.array([BLANK_TOKENS])
    lengths = lengths + -lengths % each
    if padding := -int(lengths.sum()) % align:
        lengths = np.append(lengths, padding)
    ends = np.cumsum(lengths)
    starts = ends - lengths

    tokens_T = np.zeros(int(ends[-1]), dtype=np.int64)
    before_S = starts[: len(samples)] - (np.cumsum(given_S) - given_S)  # padding before each sequence
    filled = np.arange(int(given_S.sum())) + np.repeat(before_S, given_S)
    tokens_T[filled] = joined([i for p, t in zip(prompts, parts, strict=True) for i in (p, t.response_ids)], np.int64)

    # First over the R response tokens, then only those with loss.
    mask_R = joined([t.loss_mask for t in parts], np.bool_)
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
        rollout_logprobs_L=joined([t.rollout_logprobs for t in parts], np.float32)[mask_R],
        advantages_L=np.array([s.advantage for s in samples], dtype=np.float32)[sample_L],
        coefficients_L=coefficients_S.astype(np.float32)[sample_L],
        calibrated_L=np.array([s.calibrated for s in samples], dtype=np.bool_)[sample_L],
        same_prompt_L=np.array([s.same_prompt for s in samples], dtype=np.bool_)[sample_L],
        stale_L=joined([t.stale for t in parts], np.bool_)[mask_R],
        sample_index_L=sample_L + first_index,
    )


def _check(sample: Sample) -> None:
    if not sample.train_prompt_tokens or not sample.behaviour_prompt_tokens:
        raise ValueError(f"Sample {sample.sample_id!r} has an empty prompt: nothing predicts its first token.")


def _check_lengths(sample: Sample, tokens: SampleTokens) -> None:
    said = sample.behaviour_prompt_tokens, sample.train_prompt_tokens, *[sample.response_tokens] * 4, sample.loss_tokens
    prompts = tokens.behaviour_prompt_ids, tokens.train_prompt_ids
    streams = tokens.response_ids, tokens.loss_mask, tokens.rollout_logprobs, tokens.stale
    found = *map(len, (*prompts, *streams)), int(tokens.loss_mask.sum())
    if said != found:
        raise ValueError(
            f"Sample {sample.sample_id!r}: the lengths of its prompts, response ids, mask, log-probs and stale "
            f"marks, and its loss tokens, are {found}, and must be {said}, as in its header."
        )
