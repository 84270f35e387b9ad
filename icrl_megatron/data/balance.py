"""Assigns samples to data-parallel replicas, in pure Python so that it can be tested without a grid."""

from __future__ import annotations

from collections.abc import Iterable

from icrl_megatron.types import Sample


def train_tokens(sample: Sample) -> int:
    """Tokens the trainer reads for this sample: its train prompt and its response."""
    return sample.train_prompt_tokens + sample.response_tokens


def assign(samples: Iterable[Sample], replicas: int) -> list[list[Sample]]:
    """Distributes the samples so that the replicas' token counts are close; each list is sorted by sample_id.

    Longest first, each to the replica with the fewest tokens so far (ties: fewest samples, then lowest number). Every
    sample goes to exactly one replica, and the result does not depend on the order of the samples.
    """
    if replicas < 1:
        raise ValueError(f"replicas is {replicas}: must be at least 1.")
    shares: list[list[Sample]] = [[] for _ in range(replicas)]
    load = [0] * replicas
    for sample in sorted(samples, key=lambda s: (-train_tokens(s), s.sample_id)):
        lightest = min(range(replicas), key=lambda r: (load[r], len(shares[r]), r))
        shares[lightest].append(sample)
        load[lightest] += train_tokens(sample)
    return [sorted(share, key=lambda s: s.sample_id) for share in shares]
