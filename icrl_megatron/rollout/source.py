"""The source of a synchronous run: a step's episodes are played on the ranks' engines before it is trained on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from icrl_megatron.distributed.grid import Failure, attempt, gather_results, raise_failures
from icrl_megatron.engines.protocol import EngineError, EngineLostError, EngineStats
from icrl_megatron.engines.rank import Engines, Share
from icrl_megatron.rollout import replay
from icrl_megatron.rollout.episode import Ended, EpisodeSetup, play_all
from icrl_megatron.rollout.groups import Groups, OnGroup, ignored, split_tasks
from icrl_megatron.rollout.journal import Journal, Logs
from icrl_megatron.rollout.played import Gather, Job, Played, RolloutRequest, T, together
from icrl_megatron.rollout.replay import ReplayLogs, tokens
from icrl_megatron.rollout.speakers import Meter, SpeakersFor
from icrl_megatron.types import Episode, Task, UnplayedEpisode
from icrl_megatron.utils.progress import Progress

MAX_DEATHS = 3
"""Number of engine losses in one step that ends the run."""


@dataclass
class EngineSource:
    """Each rank that leads an engine plays its share of the tasks on it. All episodes of a task, and all turns of an
    episode, stay on one engine, so that its prefix cache is used. `kept`, `lost` and `sent` change between steps."""

    setup: EpisodeSetup
    speakers_for: SpeakersFor
    engines: Engines
    resend: Callable[[bool], None]
    """Sends the current weights to restarted engines (`WeightSync.resend`); all ranks call it together."""
    gather: Gather
    progress: Progress
    kept: ReplayLogs = field(default_factory=dict)
    """Groups that were cut off (`rollout.partial`): the replay logs of their episodes."""
    lost: dict[tuple[int, str], int] = field(default_factory=dict)
    """Number of engines lost, for the step or evaluation that was played last."""
    on_group: OnGroup = ignored
    """Called on the rank that plays a task."""
    journal: Journal | None = None
    """Where the episodes of training steps are written when they end (`checkpoint.episodes`)."""
    sent: EngineStats = field(default_factory=EngineStats)
    """Weights that were sent before an evaluation; the next training step reports them."""

    def play(self, request: RolloutRequest) -> Played:
        """Raises what `episode.play_all` raises, and EngineError once MAX_DEATHS engines were lost."""
        setup, needed, seeds = request.on(self.setup), request.needed, request.seeds
        kept = self._take_kept() if needed is not None else {}
        mine = self._mine(request.tasks, kept)
        enough = len(mine) if needed is None else _part(needed, self.engines.share)
        journal = self.journal if needed is not None else None
        written = _of_tasks(mine, journal.begin(seeds) if journal is not None else {}, kept)
        groups = Groups(mine, request.episodes, enough, written | kept)
        meter, begun = Meter(tokens(written)), tokens(kept)
        left = groups.pairs()

        def on_end(result: Ended) -> None:
            if journal is not None and isinstance(result, Episode):
                journal.add(result.task, result.index, groups.log_of(result))
            groups.ended(result)

        with self.progress.phase("rollout", len(left)) as bar:

            def play_rest() -> int:
                nonlocal left
                groups.begin(lambda: bar.advance(1), self.on_group)
                speakers = meter.on(self.speakers_for)
                speakers_for = groups.recorded(speakers, setup.prompter.before_stop, journal is not None)
                results = asyncio.run(_round(play_all(left, setup, speakers_for, seeds, on_end), groups))
                left = [(r.task, r.index) for r in results if isinstance(r, UnplayedEpisode) and r.error]
                left = [] if groups.enough() else left
                return len(left)

            step = seeds.step, seeds.purpose.partition("/")[0]  # a redrawn batch belongs to the same step
            deaths = self.play_with_recovery(len(left), play_rest, self.lost.get(step, 0))
            self.lost.clear()
            self.lost[step] = deaths
        if needed is not None and self.setup.settings.partial:
            self.kept.update(groups.cut_off())
        kept_tokens, stats = tokens(self.kept) if needed else 0, self._take_stats(training=needed is not None)
        return self._together(request.tasks, groups, deaths, meter.tokens, begun, kept_tokens, stats)

    def play_with_recovery(self, left: int, play_rest: Callable[[], int], deaths: int = 0) -> int:
        """Calls `play_rest` on this rank until no rank has anything left, and restarts engines that are lost meanwhile.
        All ranks call it together. `left` is what this rank has left at first; `play_rest` returns what is left after
        it. Returns the number of lost engines, including the `deaths` before.

        Raises EngineError once MAX_DEATHS engines were lost, and on every rank what `play_rest` raises on one.
        """
        failed: BaseException | None = None
        while True:
            everyone = self.gather((self.engines.lost(), left, None if failed is None else Failure.of(failed)))
            raise_failures(failed, [failure for _, _, failure in everyone])
            if any(lost for lost, _, _ in everyone):
                deaths += self._revive([lost for lost, _, _ in everyone if lost], deaths)
            elif not any(count for _, count, _ in everyone):
                return deaths
            else:
                still_left, failed = attempt(play_rest)
                left = still_left or 0

    def _take_kept(self) -> ReplayLogs:
        kept = dict(self.kept)
        self.kept.clear()
        return kept

    def _mine(self, tasks: Sequence[Task], kept: ReplayLogs) -> list[Task]:
        """This rank's share of the tasks. All ranks call it together, each with the groups it has kept."""
        share = self.engines.share
        by_share: list[list[Task]] = [[] for _ in range(share.count)]
        if self.setup.settings.partial:
            for index, theirs in self.gather((share.index, list(kept))):
                if index is not None:
                    by_share[index] = theirs
        return [] if share.index is None else split_tasks(tasks, by_share)[share.index]

    def unfinished(self) -> Callable[[], list[str]]:
        """The groups that were cut off and continue in the next step."""
        kept = replay.copied(self.kept)
        return lambda: replay.to_lines(kept)

    def saved(self, step: int) -> None:
        if self.journal is not None:
            self.journal.drop_before(step)

    def restore(self, path: Path, known: Collection[Task]) -> int:
        share = self.engines.share
        if not self.setup.settings.partial:
            return 0
        saved = replay.read(path)
        kept = [task for task in saved if task in known]
        if share.index is not None:
            self.kept.update({task: saved[task] for task in kept[share.index :: share.count]})
        return len(saved) - len(kept)

    def run(self, job: Job[T] | None) -> T | None:
        found: list[T] = []

        def play_rest() -> int:
            if job is not None and not found:
                with suppress(EngineLostError):
                    found.append(asyncio.run(_awaited(job(self.setup, self.speakers_for))))
            return int(job is not None and not found)

        self.play_with_recovery(int(job is not None), play_rest)
        return found[0] if found else None

    def _revive(self, reasons: list[str], before: int) -> int:
        """Restarts lost engines with the current weights and returns how many there were."""
        if before + len(reasons) >= MAX_DEATHS:
            raise EngineError(f"{before + len(reasons)} engines were lost in one step. {reasons[-1]}")
        self.progress.log(f"engine lost, restarting it: {reasons[0].splitlines()[0]}")
        stale, _ = gather_results(self.gather, self.engines.revive)
        self.resend(stale)
        return len(reasons)

    def _take_stats(self, training: bool) -> EngineStats:
        taken = self.engines.take_stats() + self.sent
        self.sent = EngineStats()
        if training:
            return taken
        self.sent = EngineStats(full_pushes=taken.full_pushes, sync_bytes=taken.sync_bytes)
        return replace(taken, full_pushes=0, sync_bytes=0)

    def _together(
        self,
        tasks: Sequence[Task],
        groups: Groups,
        deaths: int,
        generated: int,
        begun: int,
        kept: int,
        stats: EngineStats,
    ) -> Played:
        """`begun` and `kept`: tokens in the replay logs before and after the step."""
        complete = groups.complete()
        used = sum(e.generated_tokens() for e in complete if isinstance(e, Episode))
        counts = np.array([groups.discarded(), begun + generated - used - kept, kept, generated])
        played, everyone = together(self.gather, tasks, complete, (counts, stats))
        cut_off, discarded, kept_by_all, generated_by_all = np.sum([of for of, _ in everyone], axis=0).tolist()
        return replace(
            played,
            engine=sum((of for _, of in everyone), EngineStats()),
            deaths=deaths,
            cut_off=cut_off,
            discarded_tokens=discarded,
            kept_tokens=kept_by_all,
            generated=generated_by_all,
        )


async def _awaited(job: Awaitable[T]) -> T:
    return await job


async def _round(playing: Awaitable[list[Ended]], groups: Groups) -> list[Ended]:
    results = await playing
    await groups.wait_for_interruption()
    return results


def _of_tasks(tasks: Sequence[Task], written: Logs, kept: ReplayLogs) -> ReplayLogs:
    """The episodes of a journal by task, without those of groups that were `kept`, which have later replies."""
    by_id = {task.task_id: task for task in tasks if task not in kept}
    found: ReplayLogs = {}
    for (task_id, index), log in written.items():
        if task_id in by_id:
            found.setdefault(by_id[task_id], {})[index] = log
    return found


def _part(needed: int, share: Share) -> int:
    return 0 if share.index is None else len(range(needed)[share.index :: share.count])
