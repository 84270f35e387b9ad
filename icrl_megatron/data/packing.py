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

import zlib
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from icrl_megatron.data.balance import assign, train_tokens
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.types import IdArray, MicroBatch, Sample, StepPlan, joined
from icrl_megatron.utils.errors import ConfigError

Prompt = Literal["train", "behaviour"]
NORMALISATIONS = ("sequence_mean", "token_mean", "constant")
BLANK_TOKENS = 2


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
) -> StepPlan:
    """The plan of one data-parallel replica, from the samples of the *whole* step (the same on every rank).

    `micro_batch_tokens` is the budget of a micro-batch, without alignment padding; a longer sequence gets its own
    micro-batch. `align`: every micro-batch is padded to a multiple of it by one sequence without loss tokens. Samples
    without loss tokens are left out, also from the normalizer. A replica with no samples in an update gets one blank
    micro-batch, so that every rank takes part in the collectives. There are never more updates than samples. `counted`:
    samples without loss that count in the normalizer all the same; updates share them evenly.

    Raises ConfigError on an unknown normalization, ValueError on samples that cannot be packed (an empty prompt,
    streams of unequal length, a duplicate sample_id, or no loss token in the whole step).
    """
    if settings.loss_normalisation not in NORMALISATIONS:
        raise ConfigError(
            f"algo.loss_normalisation is {settings.loss_normalisation!r}: choose one of {', '.join(NORMALISATIONS)}."
        )
    trained = [s for s in samples if s.loss_mask.any()]
    if not trained:
        raise ValueError("No sample of this step has a loss token: nothing can be packed.")
    for sample in trained:
        _check(sample)
    if len({s.sample_id for s in trained}) < len(trained):
        raise ValueError("Two samples of this step have the same sample_id: normalizers and order depend on it.")

    own: list[Sample] = []
    updates = []
    parts = split_updates(trained, settings.updates_per_step)
    for number, members in enumerate(parts):
        silent = counted * (number + 1) // len(parts) - counted * number // len(parts)
        coefficients = _coefficients(members, silent, settings)
        bins = _fill(assign(members, replicas)[replica], micro_batch_tokens, settings)
        micro_batches = []
        for bin_samples in bins:
            micro_batches.append(_micro_batch(bin_samples, len(own), coefficients, align, prompt))
            own += bin_samples
        updates.append(tuple(micro_batches) or (_micro_batch([], 0, {}, align, prompt),))
    return StepPlan(
        samples=tuple(own),
        updates=tuple(updates),
        global_samples=len(trained) + counted,
        global_loss_tokens=sum(s.loss_tokens() for s in trained),
    )


def split_updates(samples: Sequence[Sample], updates_per_step: int) -> list[list[Sample]]:
    """Distributes a step's samples over its optimizer updates, at most one update per sample, with sizes that differ by
    at most one.

    The order is a hash of the ids: it mixes tasks and roles, and is the same on every rank and for any order of
    arrival.
    """
    mixed = sorted(samples, key=lambda s: (zlib.crc32(s.sample_id.encode()), s.sample_id))
    count = min(updates_per_step, len(mixed))
    return [mixed[len(mixed) * u // count : len(mixed) * (u + 1) // count] for u in range(count)]


def _coefficients(members: Sequence[Sample], silent: int, settings: AlgoSettings) -> dict[str, float]:
    """sample_id -> c_t of its loss tokens; `members` are an update's samples over all replicas, and `silent` is the
    number of those that are only counted.

    sequence_mean: 1 / (samples * loss tokens of the sample). token_mean: 1 / loss tokens of the update. constant:
    1 / (samples * algo.constant_tokens), which weighs tokens of short and long replies equally (Dr. GRPO,
    arXiv 2503.20783).
    """
    samples = len(members) + silent
    counts = {s.sample_id: s.loss_tokens() for s in members}
    if settings.loss_normalisation == "token_mean":
        return dict.fromkeys(counts, 1.0 / sum(counts.values()))
    if settings.loss_normalisation == "constant":
        assert settings.constant_tokens is not None  # checked in run/checks.py
        return dict.fromkeys(counts, 1.0 / (samples * settings.constant_tokens))
    return {sample_id: 1.0 / (samples * count) for sample_id, count in counts.items()}


def _fill(samples: Sequence[Sample], budget: int, settings: AlgoSettings) -> list[list[Sample]]:
    """First fit, longest first, into micro-batches of at most `budget` tokens (or of one sequence)."""
    lengths = {s.sample_id: train_tokens(s) for s in samples}
    if settings.calibration.enabled and settings.calibration.denominator == "recomputed":
        # The trainer then reads both prompts, and the same split into micro-batches must fit both.
        for s in samples:
            lengths[s.sample_id] = max(lengths[s.sample_id], len(s.behaviour_prompt_ids) + len(s.response_ids))
    bins: list[list[Sample]] = []
    free: list[int] = []
    for sample in sorted(samples, key=lambda s: (-lengths[s.sample_id], s.sample_id)):
        need = lengths[sample.sample_id]
        slot = next((i for i, left in enumerate(free) if need <= left), len(bins))
        if slot == len(bins):
            bins.append([])
            free.append(budget)
        bins[slot].append(sample)
        free[slot] -= need
    return bins


def _micro_batch(
    samples: Sequence[Sample], first_index: int, coefficients: dict[str, float], align: int, prompt: Prompt
) -> MicroBatch:
    """Packs the sequences end to end. The token at response position j is predicted at prompt_len + j - 1."""
    prompts: list[IdArray] = [s.train_prompt_ids if prompt == "train" else s.behaviour_prompt_ids for s in samples]
    prompt_S = np.fromiter(map(len, prompts), dtype=np.int64, count=len(samples))
    response_S = np.fromiter((len(s.response_ids) for s in samples), dtype=np.int64, count=len(samples))
    lengths = (prompt_S + response_S) if samples else np.array([BLANK_TOKENS])
    if padding := -int(lengths.sum()) % align:
        lengths = np.append(lengths, padding)
    ends = np.cumsum(lengths)
    starts = ends - lengths

    tokens_T = np.zeros(int(ends[-1]), dtype=np.int64)
    filled = int((prompt_S + response_S).sum())
    tokens_T[:filled] = joined(
        [i for p, s in zip(prompts, samples, strict=True) for i in (p, s.response_ids)], np.int64
    )

    # First over the R response tokens, then only those with loss.
    mask_R = joined([s.loss_mask for s in samples], np.bool_)
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
        rollout_logprobs_L=joined([s.rollout_logprobs for s in samples], np.float32)[mask_R],
        advantages_L=np.array([s.advantage for s in samples], dtype=np.float32)[sample_L],
        coefficients_L=np.array([coefficients[s.sample_id] for s in samples], dtype=np.float32)[sample_L],
        calibrated_L=np.array([s.calibrated for s in samples], dtype=np.bool_)[sample_L],
        same_prompt_L=np.array(
            [np.array_equal(s.train_prompt_ids, s.behaviour_prompt_ids) for s in samples], dtype=np.bool_
        )[sample_L],
        sample_index_L=sample_L + first_index,
    )


def _check(sample: Sample) -> None:
    if not len(sample.train_prompt_ids) or not len(sample.behaviour_prompt_ids):
        raise ValueError(f"Sample {sample.sample_id!r} has an empty prompt: nothing predicts its first token.")
    if not len(sample.response_ids) == len(sample.loss_mask) == len(sample.rollout_logprobs):
        raise ValueError(
            f"Sample {sample.sample_id!r}: {len(sample.response_ids)} response ids, {len(sample.loss_mask)} mask "
            f"values and {len(sample.rollout_logprobs)} log-probs must be equally many."
        )
