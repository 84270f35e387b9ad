"""Sources of a step's episodes: engines, a dump of an earlier run, or generated fake data."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from icrl_megatron.algo.headers import EpisodeHeader, decode, encode, headers_of
from icrl_megatron.distributed.grid import Failure, attempt, raise_failures
from icrl_megatron.engines.protocol import EngineError, EngineStats
from icrl_megatron.engines.rank import ONE_RANK, Engines, Share
from icrl_megatron.rollout.episode import Ended, EpisodeSetup, play_all
from icrl_megatron.rollout.groups import Groups, OnGroup, ignored, split_tasks
from icrl_megatron.rollout.replay import ReplayLogs, copied, tokens
from icrl_megatron.rollout.speakers import Meter, Seeds, SpeakersFor
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.types import (
    Attempt,
    Completion,
    Critique,
    DroppedEpisode,
    Episode,
    Ids,
    Task,
    Turn,
    UnplayedEpisode,
    id_array,
    logprob_array,
)
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.progress import Progress

MAX_DEATHS = 3
"""Number of engine losses in one step that ends the run."""

Gather = Callable[[Any], list[Any]]
"""An object of this rank -> the objects of all ranks, in rank order."""


@dataclass(frozen=True)
class Played:
    """What all ranks played. All but `episodes` is the same on every rank."""

    headers: tuple[EpisodeHeader, ...]
    """The headers of the episodes of all ranks, in the order of the tasks."""
    dropped: tuple[DroppedEpisode, ...]
    episodes: tuple[Episode, ...] = ()
    """Those that this rank has (`EpisodeHeader.rank`), in the same order."""
    engine: EngineStats = field(default_factory=EngineStats)
    deaths: int = 0
    """Engines that were restarted since the step began, including during a batch that was later redrawn."""
    cut_off: int = 0
    """Episodes that were interrupted because enough groups were complete without them."""
    discarded_tokens: int = 0
    """Tokens generated so far that are not used: those of episodes that were cut off, dropped, or had to be played
    again."""
    kept_tokens: int = 0
    """Tokens in the replay logs that continue in the next step."""
    generated: int | None = None
    """Tokens generated in this step, used or not; None: the tokens of the episodes."""

    def and_more(self, later: Played) -> Played:
        """Two batches of a step as one. A task that both played counts once."""
        known = {header.task.task_id for header in self.headers}
        more = tuple(header for header in later.headers if header.task.task_id not in known)
        unused = later.used_tokens() - sum(header.generated_tokens() for header in more)
        return replace(
            later,
            headers=self.headers + more,
            episodes=self.episodes + tuple(one for one in later.episodes if one.task.task_id not in known),
            dropped=self.dropped + later.dropped,
            cut_off=self.cut_off + later.cut_off,
            discarded_tokens=self.discarded_tokens + later.discarded_tokens + unused,
            generated=self.generated_tokens() + later.generated_tokens(),
        )

    def used_tokens(self) -> int:
        """Tokens of the episodes, some of which may have been generated in the previous step."""
        return sum(header.generated_tokens() for header in self.headers)

    def generated_tokens(self) -> int:
        return self.used_tokens() if self.generated is None else self.generated


def require_playable(played: Played) -> None:
    """Raises ConfigError if every episode of a task set ended with an invalid answer."""
    working = {header.task.source for header in played.headers}
    working |= {dropped.task.source for dropped in played.dropped if not dropped.bad_answer}
    for dropped in played.dropped:
        if dropped.task.source not in working:
            raise ConfigError(f"no episode of task set {dropped.task.source!r} can be played: {dropped.error}")


@dataclass(frozen=True)
class RolloutRequest:
    """The episodes that a source plays.

    Example: RolloutRequest(tasks, episodes=8, seeds=Seeds(run=0, step=3), rounds=2)
    """

    tasks: Sequence[Task]
    episodes: int
    """Of each task: one group."""
    seeds: Seeds
    rounds: int
    """Attempts of an episode, at most."""
    needed: int | None = None
    """How many complete groups are enough, if more tasks are given; None: all of them."""
    turns: int | None = None
    """Largest number of turns of an attempt; None: `rollout.max_turns`."""


class EpisodeSource(Protocol):
    def play(self, request: RolloutRequest) -> Played:
        """Plays episodes. All ranks call it together, with the same request."""
        ...

    def replay_logs(self) -> ReplayLogs:
        """A copy of the replay logs of this rank's groups that were cut off and continue in the next step."""
        ...

    def restore_replay_logs(self, replay_logs: ReplayLogs) -> None:
        """Restores this rank's part of the replay logs of all ranks from a checkpoint, perhaps of another grid."""
        ...


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
    sent: EngineStats = field(default_factory=EngineStats)
    """Weights that were sent before an evaluation; the next training step reports them."""

    def play(self, request: RolloutRequest) -> Played:
        """Raises what `episode.play_all` raises, and EngineError once MAX_DEATHS engines were lost."""
        settings, needed, seeds = self.setup.settings, request.needed, request.seeds
        most_turns = settings.max_turns if request.turns is None else request.turns
        setup = replace(self.setup, settings=replace(settings, rounds=request.rounds, max_turns=most_turns))
        kept = self._take_kept() if needed is not None else {}
        mine = self._mine(request.tasks, kept)
        enough = len(mine) if needed is None else _part(needed, self.engines.share)
        groups = Groups(mine, request.episodes, enough, kept)
        meter, begun = Meter(), tokens(kept)
        left = groups.pairs()
        with self.progress.phase("rollout", len(left)) as bar:

            def play_rest() -> int:
                nonlocal left
                groups.begin(lambda: bar.advance(1), self.on_group)
                speakers_for = groups.recorded(meter.on(self.speakers_for), setup.prompter.before_stop)
                results = asyncio.run(_round(left, setup, speakers_for, groups, seeds))
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

    def replay_logs(self) -> ReplayLogs:
        return copied(self.kept)

    def restore_replay_logs(self, replay_logs: ReplayLogs) -> None:
        if self.engines.share.index is not None and self.setup.settings.partial:
            mine = list(replay_logs)[self.engines.share.index :: self.engines.share.count]
            self.kept.update({task: replay_logs[task] for task in mine})

    def _revive(self, reasons: list[str], before: int) -> int:
        """Restarts lost engines with the current weights and returns how many there were."""
        if before + len(reasons) >= MAX_DEATHS:
            raise EngineError(f"{before + len(reasons)} engines were lost in one step. {reasons[-1]}")
        self.progress.log(f"engine lost, restarting it: {reasons[0].splitlines()[0]}")
        stale, failed = attempt(self.engines.revive)
        everyone = self.gather(None if failed is None else Failure.of(failed))
        raise_failures(failed, everyone)
        self.resend(bool(stale))
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
        mine = [e for e in complete if isinstance(e, Episode)]
        headers = headers_of(mine)
        used = sum(header.generated_tokens() for header in headers)
        counts = np.array([groups.discarded(), begun + generated - used - kept, kept, generated])
        lost = [e for e in complete if isinstance(e, DroppedEpisode)]
        everyone = self.gather((encode(headers, tasks), lost, counts, stats))
        cut_off, discarded, kept_by_all, generated_by_all = map(int, sum(of for _, _, of, _ in everyone))
        order = {task.task_id: i for i, task in enumerate(tasks)}  # kept tasks that were not drawn come last, by id

        def order_key(result: EpisodeHeader | Episode | DroppedEpisode) -> tuple[int, str, int]:
            return order.get(result.task.task_id, len(order)), result.task.task_id, result.index

        return Played(
            tuple(sorted((h for r, (of, *_) in enumerate(everyone) for h in decode(of, tasks, r)), key=order_key)),
            tuple(sorted((dropped for _, of, _, _ in everyone for dropped in of), key=order_key)),
            tuple(sorted(mine, key=order_key)),
            sum((stats for _, _, _, stats in everyone), EngineStats()),
            deaths,
            cut_off,
            discarded,
            kept_by_all,
            generated_by_all,
        )


async def _round(
    pairs: Sequence[tuple[Task, int]], setup: EpisodeSetup, speakers_for: SpeakersFor, groups: Groups, seeds: Seeds
) -> list[Ended]:
    results = await play_all(pairs, setup, speakers_for, seeds, on_end=groups.ended)
    await groups.wait_for_interruption()
    return results


def _part(needed: int, share: Share) -> int:
    return 0 if share.index is None else len(range(needed)[share.index :: share.count])


def shared(
    episodes: Iterable[Episode], share: Share, dropped: Sequence[DroppedEpisode] = (), generated: int | None = None
) -> Played:
    """Episodes that every rank has: each rank keeps its share of them, and the headers of all. `generated`: as of
    `Played`."""
    headers, mine = list[EpisodeHeader](), list[Episode]()
    for number, episode in enumerate(episodes):  # may be a generator, so that only the share is in memory
        headers.append(EpisodeHeader.of(episode, number % share.count))
        if number % share.count == share.index:
            mine.append(episode)
    return Played(tuple(headers), tuple(dropped), tuple(mine), generated=generated)


class NoPartialRollouts:
    """Methods of a source that never cuts an episode off."""

    def replay_logs(self) -> ReplayLogs:
        return {}

    def restore_replay_logs(self, replay_logs: ReplayLogs) -> None:
        """Nothing to restore."""


@dataclass(frozen=True)
class DumpSource(NoPartialRollouts):
    """The episodes that another run dumped, step by step and then from the start again: trains without an engine."""

    rollouts: Rollouts
    share: Share = ONE_RANK

    def play(self, request: RolloutRequest) -> Played:
        steps = self.rollouts.steps
        return shared(self.rollouts.episodes(steps[request.seeds.step % len(steps)]), self.share)


@dataclass(frozen=True)
class FakeSource(NoPartialRollouts):
    """Random tokens with random rewards, with lengths that the settings allow: for testing shapes and speed, not
    learning."""

    vocabulary: int
    prompt_tokens: int
    turn_tokens: int
    critique_tokens: int
    share: Share = ONE_RANK

    def play(self, request: RolloutRequest) -> Played:
        tasks = request.tasks[: request.needed]
        return shared((self._episode(t, i, request) for t in tasks for i in range(request.episodes)), self.share)

    def _episode(self, task: Task, index: int, request: RolloutRequest) -> Episode:
        rng, rounds = random.Random(request.seeds.of(task.task_id, index, 0, "fake", 0)), request.rounds
        plain = self._ids(rng, self.prompt_tokens)
        attempts: list[Attempt] = []
        critiques: list[Critique] = []
        for round in range(rounds):
            advice = tuple(critiques[-1].completion.ids.tolist()) if critiques else ()
            turn = Turn(self._completion(rng, self.turn_tokens), "", None, "", id_array(()))
            success = rng.random() < 0.5
            attempts.append(
                Attempt(round, id_array(plain + advice), id_array(plain), (turn,), float(success), success, "", "done")
            )
            if success or round + 1 == rounds:
                break
            critiques.append(Critique(round, id_array((*plain, 1)), self._completion(rng, self.critique_tokens), ""))
        return Episode(task, index, tuple(attempts), tuple(critiques))

    def _completion(self, rng: random.Random, longest: int) -> Completion:
        ids = self._ids(rng, rng.randint(1, longest))
        return Completion(id_array(ids), logprob_array([-3.0 * rng.random() for _ in ids]), "stop", 0)

    def _ids(self, rng: random.Random, count: int) -> Ids:
        return tuple(rng.randrange(self.vocabulary) for _ in range(count))


class NoEngine:
    """The engine of sources that generate nothing. It accepts weights, so that weight sync still runs."""

    def update_weights(self, tensors: Any, version: int) -> None:
        for _ in tensors:
            pass

    def sleep(self) -> None:
        """Nothing to release or restore."""

    def wake_weights(self) -> None:
        """Nothing to release or restore."""

    def wake(self) -> None:
        """Nothing to release or restore."""
