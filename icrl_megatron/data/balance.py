"""Distributes a step's samples over optimizer updates and data-parallel replicas, from their sizes alone.

Everything here is integers and a fixed order, so every rank computes the same placement without exchanging it, whatever
its processor. Python and NumPy, so that it can be tested without a grid. Time is O(S log S) in the samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import pairwise

import numpy as np

from icrl_megatron.model.flops import SampleFlops
from icrl_megatron.types import IntArray, Sample


@dataclass(frozen=True)
class Sizes:
    """What balance and packing read of a step's S samples: one entry each, in ascending order of sample_id. No tokens.

    Example: Sizes(("t#0/0/attempt",), train_S=[700], behaviour_S=[700], loss_S=[200])
    """

    sample_ids: tuple[str, ...]
    train_S: IntArray
    """Tokens that a training pass reads: the train prompt and the response."""
    behaviour_S: IntArray
    """Tokens of the behaviour prompt and the response."""
    loss_S: IntArray
    """Tokens with loss, above 0."""

    @staticmethod
    def of(samples: Sequence[Sample]) -> Sizes:
        """`samples` must be in ascending order of sample_id and have loss tokens. Raises ValueError if they are not, or
        if two have the same id."""
        ids = tuple(s.sample_id for s in samples)
        for first, second in pairwise(ids):
            if first >= second:
                raise ValueError(
                    f"Sample {second!r} follows {first!r}: placement needs ascending order of sample_id, each id once."
                )
        response_S = _column([s.response_tokens for s in samples])
        train_S = _column([s.train_prompt_tokens for s in samples]) + response_S
        behaviour_S = _column([s.behaviour_prompt_tokens for s in samples]) + response_S
        loss_S = _column([s.loss_tokens for s in samples])
        if len(ids) and not loss_S.all():
            raise ValueError("samples without loss tokens cannot be placed: they have no work.")
        return Sizes(ids, train_S, behaviour_S, loss_S)

    def flops_S(self, flops: SampleFlops) -> IntArray:
        """[S]"""
        return flops.each(self.train_S, self.behaviour_S, self.loss_S)


@dataclass(frozen=True)
class Placement:
    """Which update and which replica trains each of the S samples.

    Example: Placement(updates=2, update_S=[0, 1, 0], replica_S=[3, 0, 0])
    """

    updates: int
    update_S: IntArray
    replica_S: IntArray

    def members(self, update: int, replica: int) -> IntArray:
        """The samples of a replica in an update, ascending: indices into the S samples."""
        return np.flatnonzero((self.update_S == update) & (self.replica_S == replica))


def place(sizes: Sizes, updates_per_step: int, flops: SampleFlops, replicas: int) -> Placement:
    """Every sample in one update and on one replica, so that the replicas' FLOPs are close in each update.

    Raises ValueError if `replicas` is below 1.
    """
    parts = split_updates(sizes.sample_ids, updates_per_step)
    flops_S = sizes.flops_S(flops)
    update_S, replica_S = np.zeros_like(flops_S), np.zeros_like(flops_S)
    for number, members in enumerate(parts):
        update_S[members] = number
        replica_S[members] = assign(flops_S[members], replicas)
    return Placement(len(parts), update_S, replica_S)


def split_updates(sample_ids: Sequence[str], updates_per_step: int) -> list[IntArray]:
    """Distributes a step's samples over its optimizer updates, at most one update per sample, with sizes that differ by
    at most one. Returns ascending indices into `sample_ids`, which must be in ascending order.

    A hash of the ids decides: it mixes tasks and roles, and is the same on every rank and for any order of arrival.
    """
    hash_S = np.fromiter((zlib.crc32(i.encode()) for i in sample_ids), dtype=np.int64, count=len(sample_ids))
    mixed = np.argsort(hash_S, kind="stable")
    count = min(updates_per_step, len(mixed))
    return [np.sort(mixed[len(mixed) * u // count : len(mixed) * (u + 1) // count]) for u in range(count)]


def assign(flops_S: IntArray, replicas: int) -> IntArray:
    """The replica [S] of each sample: the costliest first, each to the replica with the fewest FLOPs so far (ties: the
    fewest samples, then the lowest number). Samples of equal FLOPs are taken in their order.

    The heaviest replica has at most the mean plus one sample (Graham's bound for longest processing time first). Raises
    ValueError if `replicas` is below 1.
    """
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}: must be at least 1.")
    order = np.argsort(-flops_S, kind="stable")
    heap = [(0, 0, replica) for replica in range(replicas)]
    chosen = []
    for flops in flops_S[order].tolist():
        load, samples, replica = heap[0]
        chosen.append(replica)
        heapreplace(heap, (load + flops, samples + 1, replica))
    replica_S = np.empty_like(flops_S)
    replica_S[order] = chosen
    return replica_S


def imbalance(flops_S: IntArray, replica_S: IntArray, replicas: int) -> float:
    """FLOPs of the heaviest replica over the mean of all; 1 is perfect. Every replica waits for the heaviest one."""
    load_R = np.bincount(replica_S, weights=flops_S, minlength=replicas)
    return float(load_R.max() / load_R.mean())


def _column(values: list[int]) -> IntArray:
    return np.array(values, dtype=np.int64)
