"""Moves the token sequences of samples: from the rank that played an episode to the replica that trains on it.

All ranks know every sample's sizes, player and replica from headers, so nothing is negotiated. Each sample crosses to
its replica once: one rank of the replica reads it (the player itself, if it belongs to the replica; else the ranks take
turns) and shares it with the others. Every rank of a replica holds all of its samples: tensor-parallel ranks compute on
the same tokens, the first pipeline stage reads the ids, the last one the targets, log-probs and advantages; stages
between would need only lengths, but are not treated apart. A sample takes 4 bytes per prompt token and 9 per response
token. Calibration weights go back the same way, for the dumps of the rank that has the episode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from icrl_megatron.data.packing import SampleLayout
from icrl_megatron.distributed.exchange import Bytes, Numbers, Transfers, cut, send, share
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.types import Sample, SampleTokens

TokenWeights = Mapping[str, tuple[float, ...]]
"""sample_id -> calibration weight of each loss token."""
_NO_WEIGHT = -1.0
_LOSS, _STALE = np.uint8(1), np.uint8(2)
"""Bits of a response token's mark."""


def deliver(grid: Grid, layout: SampleLayout, tokens_of: Callable[[Sample], SampleTokens]) -> dict[str, SampleTokens]:
    """The tokens of this replica's samples, by sample_id. `tokens_of` is called for the samples of this rank
    (`Sample.rank`). All ranks call it together."""
    samples = layout.samples
    sizes = sizes_of(samples)
    source = np.array([s.rank for s in samples], dtype=np.int64)
    target = readers(grid, source, layout.replica_S)
    read = send(grid, Transfers(source, target, sizes), lambda i: packed(samples[i], tokens_of(samples[i])))
    own = np.flatnonzero(layout.replica_S == grid.data_rank)
    found = {int(i): read[int(i)] for i in own if int(i) in read}
    members = grid.replica_ranks(grid.data_rank)
    if len(members) > 1:
        place = {int(i): number for number, i in enumerate(own)}
        mine = {place[i]: data for i, data in found.items()}
        shared = share(grid, members, target[own], sizes[own], mine)
        found = {int(own[number]): data for number, data in shared.items()}
    return {samples[i].sample_id: unpacked(samples[i], data) for i, data in found.items()}


def send_back(grid: Grid, layout: SampleLayout, weights: TokenWeights) -> dict[str, tuple[float, ...]]:
    """The calibration weights of this rank's episodes, from the replicas that measured them. `weights`: those measured
    here. All ranks call it together. A sample that was not measured, because its update was skipped, is left out."""
    chosen = np.array([i for i, s in enumerate(layout.samples) if s.calibrated], dtype=np.int64)
    samples = [layout.samples[i] for i in chosen]
    source = np.array([grid.scoring_rank(r) for r in layout.replica_S[chosen].tolist()], dtype=np.int64)
    target = np.array([s.rank for s in samples], dtype=np.int64)
    sizes = np.array([4 * s.loss_tokens for s in samples], dtype=np.int64)

    def content(i: int) -> Bytes:
        of = weights.get(samples[i].sample_id, (_NO_WEIGHT,) * samples[i].loss_tokens)
        return np.array(of, dtype=np.float32).view(np.uint8)

    arrived = send(grid, Transfers(source, target, sizes), content)
    values = {samples[i].sample_id: data.copy().view(np.float32).tolist() for i, data in arrived.items()}
    return {i: tuple(round(v, 4) for v in of) for i, of in values.items() if of and of[0] != _NO_WEIGHT}


def readers(grid: Grid, source: Numbers, replica: Numbers) -> Numbers:
    """The rank that reads each sample for its replica."""
    ranks = np.array([grid.replica_ranks(r) for r in range(grid.data)], dtype=np.int64)
    of_rank = np.empty(grid.world, dtype=np.int64)
    of_rank[ranks] = np.arange(grid.data)[:, None]
    turn = np.arange(len(source)) % ranks.shape[1]
    found: Numbers = np.where(of_rank[source] == replica, source, ranks[replica, turn])
    return found


def sizes_of(samples: Iterable[Sample]) -> Numbers:
    """Bytes of each sample when it is sent and received."""
    return np.array([sum(_sizes(s)) for s in samples], dtype=np.int64)


def _sizes(sample: Sample) -> tuple[int, ...]:
    """Bytes of the behaviour prompt, the train prompt, the response's ids, log-probs and marks: multiples of 4."""
    train = 0 if sample.same_prompt else 4 * sample.train_prompt_tokens
    response = 4 * sample.response_tokens
    return 4 * sample.behaviour_prompt_tokens, train, response, response, -(-sample.response_tokens // 4) * 4


def packed(sample: Sample, tokens: SampleTokens) -> Bytes:
    """The sequences end to end; the train prompt only if it is another one."""
    prompts = [tokens.behaviour_prompt_ids] + ([] if sample.same_prompt else [tokens.train_prompt_ids])
    marks = tokens.loss_mask.view(np.uint8) * _LOSS + tokens.stale.view(np.uint8) * _STALE
    parts = [*prompts, tokens.response_ids, tokens.rollout_logprobs, np.pad(marks, (0, -sample.response_tokens % 4))]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts])


def unpacked(sample: Sample, data: Bytes) -> SampleTokens:
    """Inverse of `packed`. Ids and log-probs are views of `data`."""
    prompt, plain, ids, logprobs, marks = cut(data, _sizes(sample))
    marks = marks[: sample.response_tokens]
    prompt_ids = prompt.view(np.int32)
    return SampleTokens(
        prompt_ids,
        prompt_ids if sample.same_prompt else plain.view(np.int32),
        ids.view(np.int32),
        marks & _LOSS != 0,
        logprobs.view(np.float32),
        marks & _STALE != 0,
    )
