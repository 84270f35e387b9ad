"""How many groups an asynchronous run begins ahead of its training. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Lead:
    """As many groups as keep the actor from waiting, and no more: a group that waits for its step grows older, and what
    it teaches is worth less (docs/ASYNC.md). The same on every rank."""

    per_step: int
    """Groups of a step."""
    most: float
    """Largest lead in steps: `rollout.staleness`."""
    groups: int = field(init=False)
    """The lead: groups that may have been begun, beyond those of the step that is played."""

    def __post_init__(self) -> None:
        self.groups = min(self.per_step, self._limit)

    def adapt(self, complete: int) -> None:
        """`complete`: how many groups were complete when a step came to take its own. Too few: the actor waits, so the
        lead grows by a step's groups. Enough for more than two steps: it shrinks by half of the rest."""
        if complete < self.per_step:
            self.groups = min(self.groups + self.per_step, self._limit)
        else:
            rest = max(0, complete - 2 * self.per_step)
            self.groups = max(min(self.per_step, self._limit), self.groups - rest // 2)

    @property
    def _limit(self) -> int:
        return int(self.most * self.per_step + 1e-9)
