"""Where a step's episodes come from: engines, a dump of an earlier run, or thin air."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from icrl_megatron.rollout.engine import EngineError, EngineStats
from icrl_megatron.rollout.engines import Engines, Share
from icrl_megatron.rollout.episode import Ended, Stage, play_all
from icrl_megatron.rollout.groups import Groups
from icrl_megatron.rollout.speakers import Casting, Seeds
from icrl_megatron.rollout.tapes import Tape
from icrl_megatron.telemetry.dumps import dump_path, dumped_steps, read_episodes
from icrl_megatron.telemetry.progress import Progress
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
)

MAX_DEATHS = 3
"""Engines that may be lost while one step is played, until the run ends."""

Gather = Callable[[Any], list[Any]]
"""An object of this rank -> the objects of all ranks, in rank order."""


@dataclass(frozen=True)
class Played:
    """The episodes of all ranks, in the order of the tasks: the same on every rank."""

    episodes: tuple[Episode, ...]
    dropped: tuple[DroppedEpisode, ...]
    engine: EngineStats = field(default_factory=EngineStats)
    deaths: int = 0
    """Engines that had to be revived meanwhile."""
    cut_off: int = 0
    """Episodes that were interrupted, because there were enough groups without them."""

    def generated_tokens(self) -> int:
        return sum(e.generated_tokens() for e in self.episodes)


class EpisodeSource(Protocol):
    def play(
        self, tasks: Sequence[Task], episodes: int, seeds: Seeds, rounds: int, needed: int | None = None
    ) -> Played:
        """`needed`: how many complete groups are enough, where more tasks are given; None: all of them."""
        ...


@dataclass(frozen=True)
class EngineSource:
    """Each rank that leads an engine plays its share of the tasks on it; all episodes of a task stay together, and all
    turns of an episode, so that their prefixes are found in the engine's cache."""

    stage: Stage
    casting: Casting
    engines: Engines
    resend: Callable[[bool], None]
    """Brings engines that were restarted up to date (`WeightSync.resend`); all ranks call it together."""
    gather: Gather
    progress: Progress
    kept: dict[Task, dict[int, Tape]] = field(default_factory=dict)
    """Groups that were cut off (`rollout.partial`): the tape of each of their episodes."""

    def play(
        self, tasks: Sequence[Task], episodes: int, seeds: Seeds, rounds: int, needed: int | None = None
    ) -> Played:
        """Raises what `episode.play_all` raises, and EngineError once MAX_DEATHS engines were lost."""
        stage = replace(self.stage, settings=replace(self.stage.settings, rounds=rounds))
        share = self.engines.share
        mine = [] if share.index is None else list(tasks[share.index :: share.count])
        groups = Groups(mine, episodes, len(mine) if needed is None else _part(needed, share))
        if needed is not None:
            groups.go_on_with(self.kept)
        left, deaths = groups.places(), 0
        with self.progress.phase("rollout", len(left)) as bar:
            while True:
                everyone = self.gather((self.engines.lost(), len(left)))
                if any(lost for lost, _ in everyone):
                    deaths += self._revive([lost for lost, _ in everyone if lost], deaths)
                elif not any(count for _, count in everyone):
                    break
                else:
                    groups.begin(self.engines.solver, lambda: bar.advance(1))
                    results = asyncio.run(self._round(left, stage, groups, seeds))
                    left = [(r.task, r.index) for r in results if isinstance(r, UnplayedEpisode) and r.error]
                    left = [] if groups.enough() else left
        if needed is not None and self.stage.settings.partial:
            self.kept.update(groups.cut_off())
        return self._together(tasks, groups, deaths)

    async def _round(
        self, places: Sequence[tuple[Task, int]], stage: Stage, groups: Groups, seeds: Seeds
    ) -> list[Ended]:
        results = await play_all(places, stage, groups.casting(self.casting), seeds, on_end=groups.ended)
        await groups.settle()
        return results

    def _revive(self, reasons: list[str], before: int) -> int:
        """Restarts what was lost, with the current weights; returns how many engines that were."""
        if before + len(reasons) >= MAX_DEATHS:
            raise EngineError(f"{before + len(reasons)} engines were lost while one step was played. {reasons[-1]}")
        self.progress.log(f"engine lost, restarting it: {reasons[0].splitlines()[0]}")
        self.resend(self.engines.revive())
        return len(reasons)

    def _together(self, tasks: Sequence[Task], groups: Groups, deaths: int) -> Played:
        everyone = self.gather((groups.complete(), groups.discarded(), self.engines.take_stats()))
        order = {task.task_id: i for i, task in enumerate(tasks)}  # what was kept comes last, by name

        def place(result: Episode | DroppedEpisode) -> tuple[int, str, int]:
            return order.get(result.task.task_id, len(order)), result.task.task_id, result.index

        whole = sorted((r for part, _, _ in everyone for r in part), key=place)
        return Played(
            tuple(e for e in whole if isinstance(e, Episode)),
            tuple(e for e in whole if isinstance(e, DroppedEpisode)),
            sum((stats for _, _, stats in everyone), EngineStats()),
            deaths,
            sum(count for _, count, _ in everyone),
        )


def _part(needed: int, share: Share) -> int:
    return 0 if share.index is None else len(range(needed)[share.index :: share.count])


@dataclass(frozen=True)
class DumpSource:
    """The episodes that another run dumped, step after step and round again: train without an engine."""

    run_dir: Path

    def play(
        self, tasks: Sequence[Task], episodes: int, seeds: Seeds, rounds: int, needed: int | None = None
    ) -> Played:
        steps = dumped_steps(self.run_dir)
        return Played(tuple(read_episodes(dump_path(self.run_dir, steps[seeds.step % len(steps)]))), ())


@dataclass(frozen=True)
class FakeSource:
    """Random tokens with random rewards, of the lengths that the settings allow: shapes and speed, not learning."""

    vocabulary: int
    prompt_tokens: int
    turn_tokens: int
    critique_tokens: int

    def play(
        self, tasks: Sequence[Task], episodes: int, seeds: Seeds, rounds: int, needed: int | None = None
    ) -> Played:
        chosen = tasks[:needed]
        return Played(tuple(self._episode(t, i, seeds, rounds) for t in chosen for i in range(episodes)), ())

    def _episode(self, task: Task, index: int, seeds: Seeds, rounds: int) -> Episode:
        rng = random.Random(seeds.of(task.task_id, index, 0, "fake", 0))
        plain = self._ids(rng, self.prompt_tokens)
        attempts: list[Attempt] = []
        critiques: list[Critique] = []
        for round in range(rounds):
            advice = critiques[-1].completion.ids if critiques else ()
            turn = Turn(self._completion(rng, self.turn_tokens), "", None, "", ())
            success = rng.random() < 0.5
            attempts.append(Attempt(round, plain + advice, plain, (turn,), float(success), success, "", "done"))
            if success or round + 1 == rounds:
                break
            critiques.append(Critique(round, (*plain, 1), self._completion(rng, self.critique_tokens), ""))
        return Episode(task, index, tuple(attempts), tuple(critiques))

    def _completion(self, rng: random.Random, longest: int) -> Completion:
        ids = self._ids(rng, rng.randint(1, longest))
        return Completion(ids, tuple(-3.0 * rng.random() for _ in ids), "stop", 0)

    def _ids(self, rng: random.Random, count: int) -> Ids:
        return tuple(rng.randrange(self.vocabulary) for _ in range(count))


class NoEngine:
    """The engine of the sources that generate nothing: takes weights, so that the sync is exercised all the same."""

    def update_weights(self, tensors: Any, version: int) -> None:
        for _ in tensors:
            pass

    def sleep(self) -> None:
        """It holds nothing."""

    def wake_weights(self) -> None:
        """It holds nothing."""

    def wake(self) -> None:
        """It holds nothing."""
