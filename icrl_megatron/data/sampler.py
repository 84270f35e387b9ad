"""Which tasks a step plays: a pure function of (seed, step, resample), so there is no data position to save.

With a curriculum it is one of what the steps before saw, too, which the run folder holds (`curriculum.py`).
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
from icrl_megatron.utils.errors import ConfigError


def order_seed(settings: Settings) -> int:
    """`TaskSampler`'s seed: data.seed, or the run's."""
    return settings.seed if settings.data.seed is None else settings.data.seed


class TaskSampler:
    """Draws training tasks from a weighted mixture of sources, each walked round in its own shuffled order.

    All steps read one endless row of slots; a slot belongs to the source that is furthest behind its weight, so the
    mixture holds within one task at every moment, and every problem of a source comes once before any comes again.

    `problems` maps a source's name to its training problems. Raises ConfigError on no source, a source that is empty or
    named twice, and a weight that is not a positive number.
    """

    def __init__(
        self,
        sources: Sequence[TaskSource],
        problems: Mapping[str, Sequence[Task]],
        seed: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        _check(sources, problems)
        self.curriculum = curriculum
        total = math.fsum(s.weight for s in sources)
        self._weights = [s.weight / total for s in sources]
        self._orders: list[list[Task]] = []
        for source in sources:
            order = list(problems[source.name])
            random.Random(f"{seed}/order/{source.name}").shuffle(order)
            self._orders.append(order)
        self._seed = seed
        self._passed = 0
        """Slots before the row that was asked for last. Only their number by source is kept, so that the memory of a
        run does not grow with its steps."""
        self._taken = [0] * len(sources)

    @cached_property
    def known(self) -> frozenset[Task]:
        """All problems that can be drawn."""
        return frozenset(task for order in self._orders for task in order)

    def draw(self, step: int, resample: int, n: int) -> list[Task]:
        """The `n` tasks of a step (the same `n` at every step), a function of the seed and the arguments alone.

        `resample` > 0 asks for the same mixture again with other problems. A draw holds a problem twice only when its
        source has fewer problems than its share of `n`.
        """
        slots = self._row(step * n, (step + 1) * n)
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

    def _row(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Slots `start` to `stop` as (source, how many slots that source had before), in whatever order rows are asked
        for."""
        if start < self._passed:
            self._passed, self._taken = 0, [0] * len(self._taken)
        while self._passed < start:
            self._passed += 1
            self._slot(self._passed, self._taken)
        taken = list(self._taken)  # the same row may be asked for again
        return [self._slot(number, taken) for number in range(start + 1, stop + 1)]

    def _slot(self, number: int, taken: list[int]) -> tuple[int, int]:
        """The slot of this number, counted from 1, after `taken` slots of each source; counts it in `taken`."""
        source = max(range(len(taken)), key=lambda s: (number * self._weights[s] - taken[s], -s))
        taken[source] += 1
        return source, taken[source] - 1


def _check(sources: Sequence[TaskSource], problems: Mapping[str, Sequence[Task]]) -> None:
    if not sources:
        raise ConfigError("tasks.sources is empty: name at least one task set.")
    for name, times in Counter(s.name for s in sources).items():
        if times > 1:
            raise ConfigError(f"tasks.sources names {name!r} {times} times: name it once and add the weights up.")
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight > 0.0):
            raise ConfigError(
                f"tasks.sources: {source.name!r} has weight {source.weight}: it must be a positive number."
            )
        if not problems.get(source.name):
            raise ConfigError(
                f"Task set {source.name!r} has no training problems: add rows to its data.train, or take it out of "
                "tasks.sources."
            )
