"""A vocabulary sharded over tensor-parallel ranks, and softmax statistics that merge exactly over the shards.

For one row of scaled logits z, each rank keeps over its own columns

    m = max z,   s = sum exp(z - m),   u = sum exp(z - m) (z - m),   and the target's z (-inf on all ranks but its own).

With M = max_r m_r, S = sum_r exp(m_r - M) s_r and U = sum_r exp(m_r - M) (u_r + (m_r - M) s_r) over the ranks:
log p(target) = z_target - M - log S, and the entropy is log S - U / S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TILE_ELEMENTS = 1 << 18
"""Elements per tile of an elementwise pass: a tile and its scratch fit in the cache."""


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary columns that this rank's weight rows represent."""

    start: int
    """Id of the first column."""
    valid: int
    """Real columns of this shard: weight rows from `valid` on are padding and ignored."""
    vocabulary: int
    """Real columns of all shards."""
    group: dist.ProcessGroup | None = None
    """The tensor-parallel group of the shards; None for an unsharded vocabulary."""

    @classmethod
    def whole(cls, vocabulary: int) -> VocabShard:
        """The whole vocabulary on one rank."""
        return cls(0, vocabulary, vocabulary)

    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)


@dataclass(frozen=True)
class RowSoftmax:
    """Statistics of each row's softmax over the whole vocabulary. All tensors [C]."""

    logprobs_C: Tensor
    entropy_C: Tensor
    log_sum_C: Tensor
    """log S, relative to the largest logit of all ranks."""
    shift_C: Tensor
    """m - M <= 0 of this rank: its exponentials times exp(shift - log_sum) are probabilities. -inf without columns."""


def row_softmax_(logits_CV: Tensor, targets_C: Tensor, shard: VocabShard) -> RowSoftmax:
    """Statistics of scaled logits [C, shard.valid]; afterwards the buffer has exp(z - m) of this rank's columns.

    One all-gather of four numbers per row over `shard.group`; none without a group or with a group of one.
    """
    local_C = targets_C - shard.start
    owned_C = (local_C >= 0) & (local_C < shard.valid)
    partials_4C = logits_CV.new_zeros(4, logits_CV.shape[0])
    partials_4C[0::3] = -torch.inf
    if shard.valid:
        picked_C = logits_CV.gather(1, local_C.clamp(0, shard.valid - 1)[:, None])[:, 0]
        partials_4C[3] = torch.where(owned_C, picked_C, -torch.inf)
        _exponentials_(logits_CV, partials_4C)
    max_C = partials_4C[0]
    if shard.ranks() == 1:
        _, sums_C, weighted_C, target_C = partials_4C
        log_sum_C = sums_C.log()
        return RowSoftmax(target_C - max_C - log_sum_C, log_sum_C - weighted_C / sums_C, log_sum_C, max_C - max_C)
    gathered = partials_4C.new_empty(shard.ranks() * 4, partials_4C.shape[1])
    dist.all_gather_into_tensor(gathered, partials_4C, group=shard.group)
    return _merge(gathered.view(shard.ranks(), *partials_4C.shape), max_C)


def _merge(partials_R4C: Tensor, own_max_C: Tensor) -> RowSoftmax:
    max_RC, sums_RC, weighted_RC, target_RC = partials_R4C.unbind(1)
    top_C = max_RC.amax(0)
    # A shard without real columns has max -inf and sums 0: any finite shift works for it; -inf would give NaN.
    shift_RC = torch.where(max_RC == -torch.inf, 0.0, max_RC - top_C)
    scale_RC = shift_RC.exp()
    sums_C = (scale_RC * sums_RC).sum(0)
    weighted_C = (scale_RC * (weighted_RC + shift_RC * sums_RC)).sum(0)
    log_sum_C = sums_C.log()
    logprobs_C = target_RC.amax(0) - top_C - log_sum_C
    return RowSoftmax(logprobs_C, log_sum_C - weighted_C / sums_C, log_sum_C, own_max_C - top_C)


def _exponentials_(logits_CV: Tensor, partials_4C: Tensor) -> None:
    for rows, tile, scratch in row_tiles(logits_CV):
        torch.amax(tile, dim=-1, out=partials_4C[0, rows])
        torch.sub(tile, partials_4C[0, rows, None], out=scratch)
        torch.exp(scratch, out=tile)
        torch.sum(tile, dim=-1, out=partials_4C[1, rows])
        torch.sum(scratch.mul_(tile), dim=-1, out=partials_4C[2, rows])


def row_tiles(buffer_CV: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
    """(rows, their view, scratch of the same shape) for groups of rows that fit in the cache; all share one scratch."""
    tokens, columns = buffer_CV.shape
    step = max(1, min(tokens, TILE_ELEMENTS // max(1, columns)))
    scratch = buffer_CV.new_empty(step, columns)
    starts = range(0, tokens, step)
    spans = [slice(start, min(start + step, tokens)) for start in starts]
    return [(rows, buffer_CV[rows], scratch[: rows.stop - rows.start]) for rows in spans]
