"""The groups of a step on one rank: which are complete, when there are enough, and what was cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from icrl_megatron.rollout.episode import Ended
from icrl_megatron.rollout.replay import ReplayLog, ReplayLogs, Stop, recorded
from icrl_megatron.rollout.speakers import Cast, Casting, Interruptible
from icrl_megatron.types import Task, UnplayedEpisode


def deal(tasks: Sequence[Task], kept: Sequence[Sequence[Task]]) -> list[list[Task]]:
    """The tasks of each share: what it has kept first, then its part of the others, dealt in turns.

    A share has as many as if nothing had been kept. A kept task that was drawn again is played once, where it was kept:
    the same episodes twice in one step would be trained on twice.
    """
    counts = [len(tasks[index :: len(kept)]) for index in range(len(kept))]
    hands = [list(mine[:count]) for mine, count in zip(kept, counts, strict=True)]
    taken = {task.task_id for hand in hands for task in hand}
    fresh = iter([task for task in tasks if task.task_id not in taken])
    while any(len(hand) < count for hand, count in zip(hands, counts, strict=True)):
        for hand, count in zip(hands, counts, strict=True):
            if len(hand) < count:
                hand.append(next(fresh))
    return hands


class Groups:
    """A group is all episodes of one task. Once `needed` groups are complete, the others are interrupted."""

    def __init__(self, tasks: Sequence[Task], episodes: int, needed: int, kept: ReplayLogs | None = None) -> None:
        """`kept`: what earlier steps played of some of the tasks."""
        self.tasks, self._episodes, self._needed = list(tasks), episodes, needed
        self._replay_logs: ReplayLogs = {task: dict((kept or {}).get(task, {})) for task in tasks}
        self._done: dict[Task, list[Ended]] = {task: [] for task in tasks}
        self._cut = 0
        self._stop = Stop()
        self._speakers: dict[int, Interruptible] = {}
        """Who is interrupted when there are enough, by identity."""
        self._tick: Callable[[], None] = lambda: None
        self._interrupting: asyncio.Future[list[None]] | None = None

    def places(self) -> list[tuple[Task, int]]:
        return [(task, index) for task in self.tasks for index in range(self._episodes)]

    def begin(self, tick: Callable[[], None]) -> None:
        """Before episodes are played; `tick` hears of each end."""
        self._speakers, self._tick, self._stop = {}, tick, Stop()

    def casting(self, speakers: Casting) -> Casting:
        """The same speakers, recorded where episodes may be cut off or were. All of them are interrupted when there are
        enough groups: the solver, and a critic that is another engine or no engine at all."""
        if self._needed == len(self.tasks) and not any(self._replay_logs.values()):
            return speakers
        stop = self._stop

        def cast(task: Task, index: int) -> Cast:
            found = speakers(task, index)
            self._speakers |= {id(s): s for s in (found.solver, found.critic) if isinstance(s, Interruptible)}
            return recorded(found, self._replay_logs[task].setdefault(index, ReplayLog()), stop)

        return cast

    def ended(self, result: Ended) -> None:
        """Hears of every episode; interrupts the speakers, once, when the last group that is needed is complete."""
        if isinstance(result, UnplayedEpisode):
            self._cut += not result.error
            return
        self._done[result.task].append(result)
        self._tick()
        if self.enough() and not self._stop.asked and self._needed < len(self.tasks):
            self._stop.asked = True
            self._interrupting = asyncio.gather(*(speaker.interrupt() for speaker in self._speakers.values()))

    async def settle(self) -> None:
        """Until an interruption has ended: it must not meet the requests of the next step."""
        if self._interrupting is not None:
            await self._interrupting
            self._interrupting = None

    def enough(self) -> bool:
        return sum(map(self._whole, self.tasks)) >= self._needed

    def complete(self) -> list[Ended]:
        """The episodes of complete groups."""
        return [result for task in self.tasks if self._whole(task) for result in self._done[task]]

    def discarded(self) -> int:
        """Episodes that were cut off."""
        return self._cut

    def cut_off(self) -> ReplayLogs:
        """Replay logs of the groups that are not complete."""
        return {
            task: replay_logs
            for task, replay_logs in self._replay_logs.items()
            if not self._whole(task) and replay_logs
        }

    def _whole(self, task: Task) -> bool:
        return len(self._done[task]) == self._episodes
