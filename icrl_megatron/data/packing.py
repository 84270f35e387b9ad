"""Samples -> Layout -> StepPlan: optimizer updates, replicas, packed micro-batches, and global coefficients of loss
tokens. The layout needs only headers; the plan, the tokens of one replica's samples.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import numpy as np

from icrl_megatron.data.balance import assign, train_tokens
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.types import IdArray, IntArray, MicroBatch, Sample, SampleTokens, StepPlan, joined
from icrl_megatron.utils.errors import ConfigError

Prompt = Literal["train", "behaviour"]
NORMALISATIONS = ("sequence_mean", "token_mean", "constant")
BLANK_TOKENS = 2


@dataclass(frozen=True)
class Layout:
    """Which replica trains on which sample of a step, and the micro-batches of one replica, from headers alone.

    Example: Layout(samples, replica_S=[0, 1], updates=(((samples[0],),),), coefficients={"t#0": 0.5}, 2, 40)
    """

    samples: tuple[Sample, ...]
    """All samples with loss tokens, in ascending order of sample_id: the same on every rank."""
    replica_S: IntArray
    """The replica that trains on each of them."""
    updates: tuple[tuple[tuple[Sample, ...], ...], ...]
    """This replica's samples by update and micro-batch."""
    coefficients: dict[str, float]
    """sample_id -> c_t of its loss tokens, of this replica's samples."""
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
) -> Layout:
    """The layout of one data-parallel replica, from the headers of the *whole* step (the same on every rank).

    `micro_batch_tokens` is the budget of a micro-batch, without alignment padding; a longer sequence gets its own
    micro-batch. Samples without loss tokens are left out, also from the normalizer. There are never more updates than
    samples. `counted`: samples without loss that count in the normalizer all the same; updates share them evenly.

    Raises ConfigError on an unknown normalization, ValueError on samples that cannot be packed (an empty prompt, a
    duplicate sample_id, or no loss token in the whole step).
    """
    if settings.loss_normalisation not in NORMALISATIONS:
        raise ConfigError(
            f"algo.loss_normalisation is {settings.loss_normalisation!r}: choose one of {', '.join(NORMALISATIONS)}."
        )
    trained = sorted((s for s in samples if s.loss_tokens), key=attrgetter("sample_id"))
    if not trained:
        raise ValueError("No sample of this step has a loss token: nothing can be packed.")
    for sample in trained:
        _check(sample)
    if len({s.sample_id for s in trained}) < len(trained):
        raise ValueError("Two samples of this step have the same sample_id: normalizers and order depend on it.")

    replica_of: dict[str, int] = {}
    own: dict[str, float] = {}
    updates = []
    parts = split_updates(trained, settings.updates_per_step)
    for number, members in enumerate(parts):
        silent = counted * (number + 1) // len(parts) - counted * number // len(parts)
        coefficients = _coefficients(members, silent, settings)
        shares = assign(members, replicas)
        replica_of |= {s.sample_id: r for r, share in enumerate(shares) for s in share}
        own |= {s.sample_id: coefficients[s.sample_id] for s in shares[replica]}
        updates.append(tuple(map(tuple, _fill(shares[replica], micro_batch_tokens, settings))))
    return Layout(
        samples=tuple(trained),
        replica_S=np.array([replica_of[s.sample_id] for s in trained], dtype=np.int64),
        updates=tuple(updates),
        coefficients=own,
        global_samples=len(trained) + counted,
        global_loss_tokens=sum(s.loss_tokens for s in trained),
    )


def pack(layout: Layout, tokens: Mapping[str, SampleTokens], *, align: int = 1, prompt: Prompt = "train") -> StepPlan:
    """The plan of the replica of a layout, with the tokens of its samples by sample_id.

    `align`: every micro-batch is padded to a multiple of it by one sequence without loss tokens. A replica with no
    samples in an update gets one blank micro-batch, so that every rank takes part in the collectives. Raises ValueError
    if tokens do not have the lengths of their header.
    """
    own: list[Sample] = []
    updates = []
    for bins in layout.updates:
        micro_batches = []
        for bin_samples in bins:
            for sample in bin_samples:
                _check_lengths(sample, tokens[sample.sample_id])
            micro_batches.append(_micro_batch(bin_samples, tokens, len(own), layout.coefficients, align, prompt))
            own += bin_samples
        updates.append(tuple(micro_batches) or (_micro_batch([], {}, 0, {}, align, prompt),))
    return StepPlan(
        samples=tuple(own),
        updates=tuple(updates),
        global_samples=layout.global_samples,
        global_loss_tokens=layout.global_loss_tokens,
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
    counts = {s.sample_id: s.loss_tokens for s in members}
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
            lengths[s.sample_id] = max(lengths[s.sample_id], s.behaviour_prompt_tokens + s.response_tokens)
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
    samples: Sequence[Sample],
    tokens: Mapping[str, SampleTokens],
    first_index: int,
    coefficients: dict[str, float],
    align: int,
    prompt: Prompt,
) -> MicroBatch:
    """Packs the sequences end to end. The token at response position j is predicted at prompt_len + j - 1."""
    parts = [tokens[s.sample_id] for s in samples]
    prompts: list[IdArray] = [t.train_prompt_ids if prompt == "train" else t.behaviour_prompt_ids for t in parts]
    prompt_S = np.fromiter(map(len, prompts), dtype=np.int64, count=len(samples))
    response_S = np.fromiter((s.response_tokens for s in samples), dtype=np.int64, count=len(samples))
    lengths = (prompt_S + response_S) if samples else np.array([BLANK_TOKENS])
    if padding := -int(lengths.sum()) % align:
        lengths = np.append(lengths, padding)
    ends = np.cumsum(lengths)
    starts = ends - lengths

    tokens_T = np.zeros(int(ends[-1]), dtype=np.int64)
    filled = int((prompt_S + response_S).sum())
    tokens_T[:filled] = joined([i for p, t in zip(prompts, parts, strict=True) for i in (p, t.response_ids)], np.int64)

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
        coefficients_L=np.array([coefficients[s.sample_id] for s in samples], dtype=np.float32)[sample_L],
        calibrated_L=np.array([s.calibrated for s in samples], dtype=np.bool_)[sample_L],
        same_prompt_L=np.array([s.same_prompt for s in samples], dtype=np.bool_)[sample_L],
        sample_index_L=sample_L + first_index,
    )


def _check(sample: Sample) -> None:
    if not sample.train_prompt_tokens or not sample.behaviour_prompt_tokens:
        raise ValueError(f"Sample {sample.sample_id!r} has an empty prompt: nothing predicts its first token.")


def _check_lengths(sample: Sample, tokens: SampleTokens) -> None:
    said = sample.behaviour_prompt_tokens, sample.train_prompt_tokens, *[sample.response_tokens] * 3, sample.loss_tokens
    prompts, streams = [tokens.behaviour_prompt_ids, tokens.train_prompt_ids], [tokens.response_ids, tokens.loss_mask]
    found = *map(len, [*prompts, *streams, tokens.rollout_logprobs]), int(tokens.loss_mask.sum())
    if said != found:
        raise ValueError(
            f"Sample {sample.sample_id!r}: the lengths of its prompts, response ids, mask and log-probs, and its loss "
            f"tokens, are {found}, and must be {said}, as in its header."
        )
