"""Chooses the tasks of a step: a pure function of (seed, step, resample), so there is no data position to save.

With a curriculum, it also depends on the results of the previous steps, which are in the run folder (`curriculum.py`).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

from icrl_megatron.data.curriculum import Curriculum
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.types import Task

RANGES = 128
"""More than `rollout.staleness` may be: an asynchronous run draws that many steps ahead."""


def order_seed(settings: Settings) -> int:
    """The seed of `TaskSampler`: data.seed, or the run's seed."""
    return settings.seed if settings.data.seed is None else settings.data.seed


class TaskSampler:
    """Draws training tasks from a weighted mixture of sources, each cycled in its own shuffled order.

    All steps read one endless sequence of slots. Each slot belongs to the source that is furthest behind its weight, so
    the mixture is always exact to within one task, and every problem of a source is drawn once before any is drawn
    again.

    `problems` maps a source's name to its training problems, at least one.
    """

    def __init__(
        self,
        sources: Sequence[TaskSource],
        problems: Mapping[str, Sequence[Task]],
        seed: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        self.curriculum = curriculum
        total = math.fsum(s.weight for s in sources)
        self._weights = [s.weight / total for s in sources]
        self._orders: list[list[Task]] = []
        for source in sources:
            order = list(problems[source.name])
            random.Random(f"{seed}/order/{source.name}").shuffle(order)
            self._orders.append(order)
        self._seed = seed
        self._taken = {0: [0] * len(sources)}
        """Number of slots -> how many of them each source has, for the last RANGES requested ranges. So neither memory
        nor time grows with the number of steps."""

    @cached_property
    def known(self) -> frozenset[Task]:
        """All problems that can be drawn."""
        return frozenset(task for order in self._orders for task in order)

    def draw(self, step: int, resample: int, n: int) -> list[Task]:
        """The `n` tasks of a step (the same `n` at every step), a function of the seed and the arguments only.

        `resample` > 0 returns the same mixture with other problems. A draw contains a problem twice only if its source
        has fewer problems than its share of `n`.
        """
        slots = self._slots(step * n, (step + 1) * n)
        if self.curriculum is not None:
            return self._by_success(slots, self.curriculum, random.Random(f"{self._seed}/curriculum/{step}/{resample}"))
        if resample == 0:
            return [self._orders[s][position % len(self._orders[s])] for s, position in slots]
        rng = random.Random(f"{self._seed}/redraw/{step}/{resample}")
        tasks: list[Task] = []
        for source, share in sorted(Counter(s for s, _ in slots).items()):
            rounds, rest = divmod(share, len(self._orders[source]))
            tasks += self._orders[source] * rounds + rng.sample(self._orders[source], rest)
        rng.shuffle(tasks)
        return tasks

    def _by_success(self, slots: Sequence[tuple[int, int]], curriculum: Curriculum, rng: random.Random) -> list[Task]:
        shares = sorted(Counter(s for s, _ in slots).items())
        return [task for source, share in shares for task in curriculum.draw(self._orders[source], share, rng)]

    def _slots(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Slots `start` to `stop` as (source, number of earlier slots of that source). Ranges may be requested in any
        order."""
        passed = max(number for number in self._taken if number <= start)
        taken = list(self._taken[passed])
        for number in range(passed + 1, start + 1):
            self._slot(number, taken)
        self._taken[start] = list(taken)
        if len(self._taken) > RANGES:
            del self._taken[sorted(self._taken)[1]]  # not that of 0, from which all others follow
        return [self._slot(number, taken) for number in range(start + 1, stop + 1)]

    def _slot(self, number: int, taken: list[int]) -> tuple[int, int]:
        """Slot `number`, counted from 1, after `taken` slots of each source; updates `taken`."""
        source = max(range(len(taken)), key=lambda s: (number * self._weights[s] - taken[s], -s))
        taken[source] += 1
        return source, taken[source] - 1
