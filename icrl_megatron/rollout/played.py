"""What is played for a step, and the interface of the sources that play it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from icrl_megatron.algo.headers import EpisodeHeader, decode, encode, headers_of
from icrl_megatron.engines.protocol import EngineStats
from icrl_megatron.engines.rank import Share
from icrl_megatron.rollout.episode import Ended, EpisodeSetup, play
from icrl_megatron.rollout.speakers import Seeds, SpeakersFor
from icrl_megatron.types import DroppedEpisode, Episode, Task
from icrl_megatron.utils.errors import ConfigError

T = TypeVar("T")
Gather = Callable[[Any], list[Any]]
"""An object of this rank -> the objects of all ranks, in rank order."""
Job = Callable[[EpisodeSetup, SpeakersFor], Awaitable[T]]
"""Plays something other than a step's episodes. It can be pickled: it may run in another process."""


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
    version: int | None = None
    """Version of the weights that are trained, if older ones may have generated some tokens (`rollout.staleness`)."""
    behind: tuple[int, ...] = ()
    """Of each group: how many versions older than `version` the weights were when it began. Empty without
    `rollout.staleness`."""
    too_old: int = 0
    """Groups that were dropped because they began more than `rollout.staleness` versions ago."""

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
            behind=self.behind + later.behind,
            too_old=self.too_old + later.too_old,
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

    def on(self, setup: EpisodeSetup) -> EpisodeSetup:
        """The setup with this request's attempts and turns."""
        turns = setup.settings.max_turns if self.turns is None else self.turns
        return replace(setup, settings=replace(setup.settings, rounds=self.rounds, max_turns=turns))


class EpisodeSource(Protocol):
    def play(self, request: RolloutRequest) -> Played:
        """Plays episodes. All ranks call it together, with the same request."""
        ...

    def run(self, job: Job[T] | None) -> T | None:
        """Runs a job on this rank's engine, again if the engine is lost meanwhile; None: this rank has no job. All
        ranks call it together. Sources without an engine refuse jobs."""
        ...

    def unfinished(self) -> Callable[[], list[str]]:
        """Call it when a step is complete. The result returns this rank's lines of a checkpoint of that step: its
        groups that were begun and not trained on."""
        ...

    def saved(self, step: int) -> None:
        """Call it when a checkpoint has all steps before `step`, counted from 0."""
        ...

    def restore(self, path: Path, known: Collection[Task]) -> int:
        """Restores this rank's part of the lines of all ranks, perhaps of another grid, if the file exists. Returns how
        many groups were left out because their task is not in `known`: the data may have changed. Raises
        ConfigError."""
        ...


def together(gather: Gather, tasks: Sequence[Task], ended: Sequence[Ended], beside: T) -> tuple[Played, list[T]]:
    """What all ranks played, in the order of the tasks, and what each of them has `beside` it. `ended`: what this rank
    played. Tasks that are not in `tasks` come last, by id. All ranks call it together, with the same tasks."""
    mine = [one for one in ended if isinstance(one, Episode)]
    lost = [one for one in ended if isinstance(one, DroppedEpisode)]
    everyone = gather((encode(headers_of(mine), tasks), lost, beside))
    order = {task.task_id: i for i, task in enumerate(tasks)}

    def order_key(result: EpisodeHeader | Episode | DroppedEpisode) -> tuple[int, str, int]:
        return order.get(result.task.task_id, len(order)), result.task.task_id, result.index

    headers = sorted((h for r, (of, *_) in enumerate(everyone) for h in decode(of, tasks, r)), key=order_key)
    dropped = sorted((one for _, of, _ in everyone for one in of), key=order_key)
    return Played(tuple(headers), tuple(dropped), tuple(sorted(mine, key=order_key))), [of for *_, of in everyone]


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


async def play_request(
    tasks: Sequence[Task], request: RolloutRequest, setup: EpisodeSetup, speakers_for: SpeakersFor
) -> list[Ended]:
    """Plays some of a request's tasks. Raises EngineLostError if the engine was lost."""
    played, dropped = await play(tasks, request.episodes, request.on(setup), speakers_for, request.seeds)
    return [*played, *dropped]


@runtime_checkable
class Probing(Protocol):
    """A source whose episodes may have no token of the current weights."""

    def probes(self) -> Played:
        """A few short replies of each engine under the current weights, in addition to the step's episodes. All ranks
        call it together, before the actor's weights change."""
        ...


class WithoutEngine:
    """Methods of a source that has no engine, and ends all episodes that it begins."""

    def run(self, job: Job[T] | None) -> T | None:
        raise RuntimeError("this source generates nothing, so it cannot run a job on an engine")

    def unfinished(self) -> Callable[[], list[str]]:
        return list

    def saved(self, step: int) -> None:
        """Nothing is kept for a resume."""

    def restore(self, path: Path, known: Collection[Task]) -> int:
        return 0
