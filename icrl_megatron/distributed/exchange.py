"""Bytes from the rank that has them to the ranks that need them, in bounded pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from icrl_megatron.distributed.grid import Grid

PIECE_BYTES = 2 << 20
"""Most bytes that one rank sends, and that one receives, in a round; a larger transfer has its own round."""
Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Transfers:
    """The transfers of a step, one entry each: the same on all ranks, because they are computed from headers."""

    source: Numbers
    """The rank that has it."""
    target: Numbers
    """The rank that gets it."""
    size: Numbers
    """Bytes."""

    def rounds(self, limit: int = PIECE_BYTES) -> Numbers:
        """The round of each transfer: in a round, no rank sends or receives more than `limit` bytes, unless one
        transfer is larger. Rounds of one pair of ranks do not decrease, so transfers keep their order."""
        sending: dict[int, tuple[int, int]] = {}
        receiving: dict[int, tuple[int, int]] = {}
        found = []
        for source, target, size in zip(self.source.tolist(), self.target.tolist(), self.size.tolist(), strict=True):
            sent, received = sending.get(source, (0, 0)), receiving.get(target, (0, 0))
            number = max(sent[0], received[0])
            out, into = (of[1] if of[0] == number else 0 for of in (sent, received))
            if max(out, into) and max(out, into) + size > limit:
                number, out, into = number + 1, 0, 0
            sending[source], receiving[target] = (number, out + size), (number, into + size)
            found.append(number)
        return np.array(found, dtype=np.int64)


def send(grid: Grid, transfers: Transfers, content: Callable[[int], Bytes]) -> dict[int, Bytes]:
    """Each transfer goes from its source to its target, once. Returns this rank's transfers by number.

    `content(number)` is called on the source. A transfer whose target is its source is not copied. All ranks call it
    together, with the same transfers. Holds at most two rounds' bytes besides what it returns."""
    kept = np.flatnonzero((transfers.source == grid.rank) & (transfers.target == grid.rank))
    found = {int(number): content(int(number)) for number in kept}
    moving = np.flatnonzero(transfers.source != transfers.target)
    if len(moving) == 0:
        return found
    rounds = Transfers(transfers.source[moving], transfers.target[moving], transfers.size[moving]).rounds()
    for number in range(int(rounds.max()) + 1):
        now = moving[rounds == number]
        outgoing = now[transfers.source[now] == grid.rank]
        outgoing = outgoing[np.argsort(transfers.target[outgoing], kind="stable")]
        incoming = now[transfers.target[now] == grid.rank]
        incoming = incoming[np.argsort(transfers.source[incoming], kind="stable")]
        arrived = _all_to_all(
            grid,
            [content(int(one)) for one in outgoing],
            _by_rank(grid, transfers.target[outgoing], transfers.size[outgoing]),
            _by_rank(grid, transfers.source[incoming], transfers.size[incoming]),
        )
        found |= zip(incoming.tolist(), cut(arrived, transfers.size[incoming]), strict=True)
    return found


def share(
    grid: Grid, members: Sequence[int], owner: Numbers, size: Numbers, mine: dict[int, Bytes]
) -> dict[int, Bytes]:
    """All transfers of a group of ranks on each of its ranks. `owner`: the rank of the group that has each transfer;
    `mine`: those of this rank. All ranks of the grid call it together, each with its own group, and all groups are of
    one size. In a round, a group shares at most `PIECE_BYTES`, or one larger transfer."""
    rounds = _running(size)
    count = torch.tensor(int(rounds[-1]) + 1 if len(rounds) else 0)
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=grid.host_group)
    found = dict(mine)
    peers = [rank for rank in members if rank != grid.rank]
    for number in range(int(count)):
        now = np.flatnonzero(rounds == number)
        own = now[owner[now] == grid.rank]
        others = now[owner[now] != grid.rank]
        others = others[np.argsort(owner[others], kind="stable")]
        whole = np.zeros(grid.world, dtype=np.int64)
        whole[peers] = int(size[own].sum())
        arrived = _all_to_all(
            grid, [mine[int(one)] for _ in peers for one in own], whole, _by_rank(grid, owner[others], size[others])
        )
        found |= zip(others.tolist(), cut(arrived, size[others]), strict=True)
    return found


def cut(data: Bytes, sizes: Sequence[int] | Numbers) -> list[Bytes]:
    """Consecutive parts of these sizes, without a copy."""
    ends = np.cumsum(sizes, dtype=np.int64)
    return [data[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]


def _all_to_all(grid: Grid, outgoing: Sequence[Bytes], out_sizes: Numbers, in_sizes: Numbers) -> Bytes:
    """`outgoing`, ordered by target; returns what arrived, ordered by source."""
    data = np.concatenate(outgoing) if outgoing else np.zeros(0, dtype=np.uint8)
    arrived = torch.empty(int(in_sizes.sum()), dtype=torch.uint8)
    dist.all_to_all_single(
        arrived, torch.from_numpy(data), in_sizes.tolist(), out_sizes.tolist(), group=grid.host_group
    )
    return arrived.numpy()


def _by_rank(grid: Grid, ranks: Numbers, sizes: Numbers) -> Numbers:
    return np.bincount(ranks, weights=sizes, minlength=grid.world).astype(np.int64)


def _running(sizes: Numbers) -> Numbers:
    """The round of each transfer of a group, in order. A round has at most PIECE_BYTES, or one larger transfer."""
    found, number, load = [], 0, 0
    for size in sizes.tolist():
        if load and load + size > PIECE_BYTES:
            number, load = number + 1, 0
        load += size
        found.append(number)
    return np.array(found, dtype=np.int64)
