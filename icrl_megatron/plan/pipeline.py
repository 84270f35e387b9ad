"""What a pipeline of stages loses to waiting: bubbles at both ends, and unequal micro-batches between them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from icrl_megatron.data.packing import first_fit
from icrl_megatron.plan.workload import Floats

BACKWARD = 2.0
"""Time of a backward pass over that of a forward pass."""


def packed(sequence_S: Floats, replicas: int, updates: int, budget: int) -> tuple[float, ...]:
    """Tokens of the micro-batches of one update on one replica: sequences dealt longest first, then first fit."""
    share = np.sort(sequence_S)[::-1][::replicas][::updates]
    return _packed(tuple(np.rint(share).astype(int).tolist()), budget)


@lru_cache(maxsize=256)
def _packed(lengths: tuple[int, ...], budget: int) -> tuple[float, ...]:
    return tuple(float(sum(lengths[i] for i in batch)) for batch in first_fit(np.array(lengths), budget))


def waiting_forward(tokens_M: tuple[float, ...], stages: int) -> float:
    """Share that forward passes alone take longer than one stage's own work: while the first micro-batch travels to the
    last stage, at the pace of the longest (a flow shop whose machines are alike)."""
    return (stages - 1) * max(tokens_M) / sum(tokens_M)


@lru_cache(maxsize=1024)
def waiting_1f1b(tokens_M: tuple[float, ...], stages: int) -> float:
    """Share that training takes longer than one stage's own work under the 1F1B schedule (arXiv 2104.04473).

    The schedule is played through: a stage runs its passes in their order, each as soon as its input is there. With
    equal micro-batches this is (stages - 1) / micro-batches.
    """
    if stages == 1:
        return 0.0
    count = len(tokens_M)
    orders = [_order(stage, stages, count) for stage in range(stages)]
    ended: dict[tuple[int, int, bool], float] = {}
    position, free = [0] * stages, [0.0] * stages
    while any(at < 2 * count for at in position):
        for stage in range(stages):
            while position[stage] < 2 * count:
                batch, backward = orders[stage][position[stage]]
                needs = _needs(stage, stages, batch, backward)
                if needs is not None and needs not in ended:
                    break
                begun = max(free[stage], ended[needs] if needs else 0.0)
                free[stage] = begun + tokens_M[batch] * (BACKWARD if backward else 1.0)
                ended[stage, batch, backward] = free[stage]
                position[stage] += 1
    return max(free) / ((1.0 + BACKWARD) * sum(tokens_M)) - 1.0


def _order(stage: int, stages: int, count: int) -> list[tuple[int, bool]]:
    """(micro-batch, backward?) in a stage's order: forward passes ahead, then one of each, then what is left."""
    ahead = min(stages - 1 - stage, count)
    order = [(batch, False) for batch in range(ahead)]
    for batch in range(count - ahead):
        order += [(batch + ahead, False), (batch, True)]
    return order + [(batch, True) for batch in range(count - ahead, count)]


def _needs(stage: int, stages: int, batch: int, backward: bool) -> tuple[int, int, bool] | None:
    """The pass whose result this one waits for."""
    if not backward:
        return (stage - 1, batch, False) if stage else None
    return (stage + 1, batch, True) if stage + 1 < stages else (stage, batch, False)
