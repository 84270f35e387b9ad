"""Rollout steps with and without oversampling, timed per episode (for `bench_rollout.py`).

A model with random weights does not end replies itself, so the maximum length of each reply is drawn: log-normal,
identical for the same task, episode and role in every step, with a few that are many times the median.
"""

from __future__ import annotations

import io
import math
import random
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from icrl_megatron.engines.rank import Engines, Share
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.rollout.episode import EpisodeSetup
from icrl_megatron.rollout.played import RolloutRequest
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.source import EngineSource
from icrl_megatron.rollout.speakers import Ask, EngineSpeaker, Seeds, Speakers
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks import registry
from icrl_megatron.types import Completion, Task
from icrl_megatron.utils.progress import Progress

MEDIAN_TOKENS, SIGMA, MOST_TOKENS = 16, 1.0, 160
EPISODES_PER_TASK = 4


@dataclass
class Watch:
    """Times each episode from its first request to its last reply."""

    begun: dict[tuple[str, int], float] = field(default_factory=dict)
    ended: dict[tuple[str, int], float] = field(default_factory=dict)

    def seconds(self, task_id: str, index: int) -> float:
        return self.ended[task_id, index] - self.begun[task_id, index]


@dataclass(frozen=True)
class _Watched:
    speaker: EngineSpeaker
    watch: Watch
    place: tuple[str, int]

    async def reply(self, ask: Ask) -> Completion:
        self.watch.begun.setdefault(self.place, time.perf_counter())
        drawn = random.Random(f"{self.place} {ask.role}").lognormvariate(math.log(MEDIAN_TOKENS), SIGMA)
        room = max(1, min(ask.max_new_tokens, MOST_TOKENS, round(drawn)))
        reply = await self.speaker.reply(replace(ask, max_new_tokens=room))
        self.watch.ended[self.place] = time.perf_counter()
        return reply

    async def interrupt(self) -> None:
        await self.speaker.interrupt()


@dataclass(frozen=True)
class Step:
    """One step: the tasks it needed, and what it cost."""

    seconds: float
    episode_seconds: tuple[float, ...]
    """Tokens of the episodes of complete groups."""
    used_tokens: int
    generated_tokens: int
    cut_off: int
    cache_hit_rate: float


def setup_of(folder: Path, context_tokens: int) -> EpisodeSetup:
    """Household on the model of `folder`."""
    settings = RolloutSettings(
        max_turn_tokens=MOST_TOKENS, max_critique_tokens=MOST_TOKENS, context_tokens=context_tokens, templates="compact"
    )
    return EpisodeSetup(registry.environment, Prompter(AutoTokenizer.from_pretrained(folder), settings), settings)


def step(engine: SGLangEngine, setup: EpisodeSetup, tasks: int, oversample: float, number: int) -> Step:
    """Plays one step that needs `tasks` groups."""
    watch, talker = Watch(), EngineSpeaker(engine, 1.0, setup.prompter.stop_ids)

    def speakers_of(task: Task, index: int) -> Speakers:
        watched = _Watched(talker, watch, (task.task_id, index))
        return Speakers(watched, watched)

    def nothing_to_resend(stale: bool) -> None:
        """No engine is lost here."""

    def alone(mine: Any) -> list[Any]:
        return [mine]

    engines = Engines(engine, engine, None, Share(0, 1))
    quiet = Progress(console=Console(file=io.StringIO()))
    source = EngineSource(setup, speakers_of, engines, nothing_to_resend, alone, quiet)
    known = list(registry.get("household").problems("train"))
    chosen = known[: math.ceil(tasks * oversample)]
    begun = time.perf_counter()
    played = source.play(RolloutRequest(chosen, EPISODES_PER_TASK, Seeds(0, number), setup.settings.rounds, tasks))
    seconds = time.perf_counter() - begun
    return Step(
        seconds,
        tuple(watch.seconds(e.task.task_id, e.index) for e in played.episodes),
        played.used_tokens(),
        played.generated_tokens(),
        played.cut_off,
        played.engine.cached_tokens / max(1, played.engine.prompt_tokens),
    )
