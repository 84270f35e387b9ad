"""Tracks the groups of a step on one rank: which are complete, whether there are enough, and what was cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from icrl_megatron.engines.continuing import BeforeStop
from icrl_megatron.rollout.episode import Ended
from icrl_megatron.rollout.replay import ReplayLog, ReplayLogs, Stop, recorded
from icrl_megatron.rollout.speakers import Interruptible, Speakers, SpeakersFor
from icrl_megatron.types import Episode, Task, UnplayedEpisode

OnGroup = Callable[[Sequence[Ended]], None]
"""Gets the episodes of one task once all of them have ended."""


def ignored(group: Sequence[Ended]) -> None:
    """Does nothing with the episodes of a task."""


def split_tasks(tasks: Sequence[Task], kept: Sequence[Sequence[Task]]) -> list[list[Task]]:
    """Splits tasks over shares. Each share gets the tasks it has kept first, then its part of the others, round-robin.

    A share's size does not depend on what was kept. A kept task that was drawn again is played once, on the share that
    kept it: the same episodes twice in one step would be trained on twice.
    """
    counts = [len(tasks[index :: len(kept)]) for index in range(len(kept))]
    shares = [list(mine[:count]) for mine, count in zip(kept, counts, strict=True)]
    taken = {task.task_id for share in shares for task in share}
    fresh = iter([task for task in tasks if task.task_id not in taken])
    while any(len(share) < count for share, count in zip(shares, counts, strict=True)):
        for share, count in zip(shares, counts, strict=True):
            if len(share) < count:
                share.append(next(fresh))
    return shares


class Groups:
    """A group is all episodes of one task. Once `needed` groups are complete, the others are interrupted."""

    def __init__(self, tasks: Sequence[Task], episodes: int, needed: int, kept: ReplayLogs | None = None) -> None:
        """`kept`: replay logs from earlier steps for some of the tasks."""
        self.tasks, self._episodes, self._needed = list(tasks), episodes, needed
        self._replay_logs: ReplayLogs = {task: dict((kept or {}).get(task, {})) for task in tasks}
        self._done: dict[Task, list[Ended]] = {task: [] for task in tasks}
        self._cut = 0
        self._stop = Stop()
        self._speakers: dict[int, Interruptible] = {}
        """The speakers to interrupt when enough groups are complete, by id()."""
        self._tick: Callable[[], None] = lambda: None
        self._completed: OnGroup = ignored
        self._interrupting: asyncio.Future[list[None]] | None = None

    def pairs(self) -> list[tuple[Task, int]]:
        return [(task, index) for task in self.tasks for index in range(self._episodes)]

    def begin(self, tick: Callable[[], None], completed: OnGroup = ignored) -> None:
        """Call before episodes are played. `tick` is called at the end of each episode, `completed` at the end of the
        last one of a task."""
        self._speakers, self._tick, self._completed, self._stop = {}, tick, completed, Stop()

    def recorded(self, speakers_for: SpeakersFor, before_stop: BeforeStop, always: bool = False) -> SpeakersFor:
        """The same speakers, with replay logs if episodes may be or were cut off, or `always`. When enough groups are
        complete, all of them are interrupted: the solver, and the critic if it is another engine or not an engine."""
        if self._needed == len(self.tasks) and not any(self._replay_logs.values()) and not always:
            return speakers_for
        stop = self._stop

        def speakers_of(task: Task, index: int) -> Speakers:
            found = speakers_for(task, index)
            self._speakers |= {id(s): s for s in (found.solver, found.critic) if isinstance(s, Interruptible)}
            return recorded(found, self._replay_logs[task].setdefault(index, ReplayLog()), stop, before_stop)

        return speakers_of

    def log_of(self, result: Episode) -> ReplayLog:
        """The replies of an episode that was `recorded`."""
        return self._replay_logs[result.task][result.index]

    def ended(self, result: Ended) -> None:
        """Call with the result of every episode. Interrupts the speakers once, when the last needed group is
        complete."""
        if isinstance(result, UnplayedEpisode):
            self._cut += not result.error
            return
        self._done[result.task].append(result)
        self._tick()
        if self._whole(result.task):
            self._completed(self._done[result.task])
        if self.enough() and not self._stop.asked and self._needed < len(self.tasks):
            self._stop.asked = True
            self._interrupting = asyncio.gather(*(speaker.interrupt() for speaker in self._speakers.values()))

    async def wait_for_interruption(self) -> None:
        """Waits until the interruption has ended, so that it does not affect requests of the next step."""
        if self._interrupting is not None:
            await self._interrupting
            self._interrupting = None

    def enough(self) -> bool:
        return sum(map(self._whole, self.tasks)) >= self._needed

    def complete(self) -> list[Ended]:
        """The episodes of complete groups."""
        return [result for task in self.tasks if self._whole(task) for result in self._done[task]]

    def discarded(self) -> int:
        """Number of episodes that were cut off."""
        return self._cut

    def cut_off(self) -> ReplayLogs:
        """Replay logs of incomplete groups."""
        return {
            task: replay_logs
            for task, replay_logs in self._replay_logs.items()
            if not self._whole(task) and replay_logs
        }

    def _whole(self, task: Task) -> bool:
        return len(self._done[task]) == self._episodes
