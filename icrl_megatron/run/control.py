"""Measures whether second attempts succeed because of the critique: failed attempts are retried with the critique, with
an empty one, and from scratch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from icrl_megatron.engines.protocol import RequestFailedError
from icrl_megatron.rollout.context_budget import TooLongError
from icrl_megatron.rollout.episode import Ended, EpisodeKey, EpisodeSetup, gather, play, play_attempt, play_critique
from icrl_megatron.rollout.speakers import Seeds, SpeakersFor
from icrl_megatron.rollout.watchdog import WATCHDOG
from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.types import DroppedEpisode, Episode, Task, UnplayedEpisode
from icrl_megatron.utils.intervals import Difference, Proportion, paired_difference, proportion

Arms = tuple[bool, bool, bool]
"""Success with the critique, with an empty one, and from scratch."""


@dataclass(frozen=True)
class ControlResult:
    """Results of second attempts after the same failed first attempts, in three arms."""

    failures: int
    """Failed first attempts that were retried: the n of each arm."""
    first_attempts: int
    dropped: int
    critique: Proportion
    """Revision with the critic's critique."""
    empty: Proportion
    """Revision prompt with an empty critique."""
    plain: Proportion
    """Another attempt from scratch, without a critique."""
    critique_minus_empty: Difference
    critique_minus_plain: Difference


@dataclass
class ControlState:
    """What has been played for a control report, so that it can continue after its engine was lost."""

    first: dict[Task, Episode | DroppedEpisode] = field(default_factory=dict)
    retried: dict[Task, Arms | None] = field(default_factory=dict)

    def heard(self, ended: Ended) -> None:
        if not isinstance(ended, UnplayedEpisode):
            self.first[ended.task] = ended


async def control(
    problems: Sequence[Task],
    limit: int,
    seeds: Seeds,
    state: ControlState,
    setup: EpisodeSetup,
    speakers_for: SpeakersFor,
) -> ControlResult:
    """Plays first attempts, and retries each failed one with its critique, with an empty one, and from scratch.

    At most `limit` failures are retried, the first ones in the order of `problems`; each problem is tried once. The
    three arms draw independent samples. Results in `state` are not played again. Raises what `episode.play` raises.
    """
    one_round = replace(setup, settings=replace(setup.settings, rounds=1))
    first = replace(seeds, purpose=f"{seeds.purpose}/first")
    await play([t for t in problems if t not in state.first], 1, one_round, speakers_for, first, state.heard)
    episodes = [e for e in (state.first[task] for task in problems) if isinstance(e, Episode)]
    dropped = len(problems) - len(episodes)
    failed = [e for e in episodes if not e.attempts[0].success][:limit]
    gate = asyncio.Semaphore(setup.settings.concurrency)
    todo = [e for e in failed if e.task not in state.retried]
    await gather([_retry(gate, episode, setup, speakers_for, seeds, state) for episode in todo])
    retries = [state.retried[e.task] for e in failed]
    arms = np.array([r for r in retries if r is not None], dtype=np.int64).reshape(-1, 3)
    critique, empty, plain = (proportion(int(arm.sum()), len(arms)) for arm in arms.T)
    return ControlResult(
        failures=len(arms),
        first_attempts=len(episodes),
        dropped=dropped + sum(r is None for r in retries),
        critique=critique,
        empty=empty,
        plain=plain,
        critique_minus_empty=paired_difference(arms[:, 0] - arms[:, 1]),
        critique_minus_plain=paired_difference(arms[:, 0] - arms[:, 2]),
    )


async def _retry(
    gate: asyncio.Semaphore,
    first: Episode,
    setup: EpisodeSetup,
    speakers_for: SpeakersFor,
    seeds: Seeds,
    state: ControlState,
) -> None:
    """Records the success of the three arms after one failed attempt; None if the environment failed, a request failed
    twice, or a prompt that is too long is dropped."""
    async with gate:
        for _ in range(2):
            try:
                with WATCHDOG.watching():
                    state.retried[first.task] = await _arms(first, setup, speakers_for, seeds)
                return
            except RequestFailedError:
                continue
            except EnvironmentFailure:
                break
            except TooLongError:
                if not setup.drop_too_long:
                    raise
                break
    state.retried[first.task] = None


async def _arms(first: Episode, setup: EpisodeSetup, speakers_for: SpeakersFor, seeds: Seeds) -> Arms:
    task, index, attempt = first.task, first.index, first.attempts[0]

    async def arm(name: str, critique: str | None) -> bool:
        key = EpisodeKey(task, index, replace(seeds, purpose=f"{seeds.purpose}/{name}"))
        environment = setup.new_environment(task)
        round = 0 if critique is None else 1
        _, retried = await play_attempt(key, round, critique, environment, setup, speakers_for(task, index).solver)
        return retried.success

    key = EpisodeKey(task, index, replace(seeds, purpose=f"{seeds.purpose}/critique"))
    environment = setup.new_environment(task)
    opening = await setup.opened(environment)
    critique = await play_critique(key, opening, attempt, setup, speakers_for(task, index).critic)
    return await arm("critique", critique.text), await arm("empty", ""), await arm("plain", None)
