"""Where a step's episodes come from: engines, a dump of an earlier run, or thin air."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from icrl_megatron.rollout.episode import Stage, play
from icrl_megatron.rollout.speakers import Casting, Seeds
from icrl_megatron.telemetry.dumps import dump_path, dumped_steps, read_episodes
from icrl_megatron.telemetry.progress import Progress
from icrl_megatron.types import Attempt, Completion, Critique, DroppedEpisode, Episode, Ids, Task, Turn

Gather = Callable[[Any], list[Any]]
"""An object of this rank -> the objects of all ranks, in rank order."""


@dataclass(frozen=True)
class Played:
    """The episodes of all ranks, in the order of the tasks: the same on every rank."""

    episodes: tuple[Episode, ...]
    dropped: tuple[DroppedEpisode, ...]

    def generated_tokens(self) -> int:
        return sum(e.generated_tokens() for e in self.episodes)


class EpisodeSource(Protocol):
    def play(self, tasks: Sequence[Task], episodes: int, seeds: Seeds, rounds: int) -> Played: ...


@dataclass(frozen=True)
class EngineSource:
    """Each rank plays its share of the tasks on its own engine; all episodes of a task stay together."""

    stage: Stage
    casting: Casting
    rank: int
    world: int
    gather: Gather
    progress: Progress

    def play(self, tasks: Sequence[Task], episodes: int, seeds: Seeds, rounds: int) -> Played:
        """Raises what `episode.play` raises."""
        stage = replace(self.stage, settings=replace(self.stage.settings, rounds=rounds))
        mine = list(tasks[self.rank :: self.world])
        with self.progress.phase("rollout", len(mine) * episodes) as bar:
            played = asyncio.run(play(mine, episodes, stage, self.casting, seeds, on_end=lambda _: bar.advance(1)))
        order = {task.task_id: i for i, task in enumerate(tasks)}
        everyone = self.gather(played)
        done = sorted((e for part, _ in everyone for e in part), key=lambda e: (order[e.task.task_id], e.index))
        lost = sorted((d for _, part in everyone for d in part), key=lambda d: (order[d.task.task_id], d.index))
        return Played(tuple(done), tuple(lost))


@dataclass(frozen=True)
class DumpSource:
    """The episodes that another run dumped, step after step and round again: train without an engine."""

    run_dir: Path

    def play(self, tasks: Sequence[Task], episodes: int, seeds: Seeds, rounds: int) -> Played:
        steps = dumped_steps(self.run_dir)
        return Played(tuple(read_episodes(dump_path(self.run_dir, steps[seeds.step % len(steps)]))), ())


@dataclass(frozen=True)
class FakeSource:
    """Random tokens with random rewards, of the lengths that the settings allow: shapes and speed, not learning."""

    vocabulary: int
    prompt_tokens: int
    turn_tokens: int
    critique_tokens: int

    def play(self, tasks: Sequence[Task], episodes: int, seeds: Seeds, rounds: int) -> Played:
        return Played(tuple(self._episode(t, i, seeds, rounds) for t in tasks for i in range(episodes)), ())

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
