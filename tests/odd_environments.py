"""Environments with one fault each, and a speaker without a model to play them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.episode import EpisodeSetup, play_episode
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.speakers import Ask, Seeds, Speakers
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import StepResult
from icrl_megatron.types import Completion, DroppedEpisode, Episode, Task

SETTINGS = RolloutSettings(
    rounds=2, max_turn_tokens=4, max_critique_tokens=4, context_tokens=300, templates="compact", max_turns=4
)
PROMPTER = Prompter(build_tokenizer(["go", "up", "down", *template_words("compact")]), SETTINGS)
TASK = Task("set/train/0", "set", "train", "a problem")
METHODS = ("reset", "parse", "hint", "step", "outcome", "success", "summary", "measures")
WAITS = ("reset", "step")


class Works:
    """A correct environment whose attempts fail, so that all of its methods are called."""

    max_turns: Any = 3

    def __init__(self, task: Task) -> None:
        self.turns = 0

    async def reset(self) -> str:
        self.turns = 0
        return "go"

    def parse(self, reply: str) -> str | None:
        self.turns += 1
        return None if self.turns == 1 else reply

    def hint(self) -> str:
        return "go"

    async def step(self, action: str) -> StepResult:
        return StepResult("down", self.turns > 2)

    def outcome(self) -> float:
        return 0.5

    def success(self) -> bool:
        return False

    def summary(self) -> str:
        return "down"


class Says:
    """A speaker without a model."""

    async def reply(self, ask: Ask) -> Completion:
        ids = PROMPTER.encode_reply("up")
        return Completion(ids, (0.0,) * len(ids), "stop", 0)


def play_one(factory: Callable[[Task], Any], **changes: Any) -> Episode | DroppedEpisode:
    setup = EpisodeSetup(factory, PROMPTER, replace(SETTINGS, **changes))
    return asyncio.run(play_episode(TASK, 0, setup, lambda task, index: Speakers(Says(), Says()), Seeds(0, 0)))


def returning(method: str, value: object, wrapped: bool = True) -> type[Works]:
    """An environment whose `method` returns `value`; if `wrapped`, asynchronous methods stay coroutines."""

    async def wait(self: Works, *arguments: object) -> Any:
        return value

    def sync(self: Works, *arguments: object) -> Any:
        return value

    return type("Returns", (Works,), {method: wait if method in WAITS and wrapped else sync})


def raising(method: str, error: BaseException | type[BaseException]) -> type[Works]:
    async def wait(self: Works, *arguments: object) -> Any:
        raise error

    def sync(self: Works, *arguments: object) -> Any:
        raise error

    return type("Raises", (Works,), {method: wait if method in WAITS else sync})


class Hostile:
    """Raises on every operation."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("no attributes")

    def _raise(self, *arguments: object) -> Any:
        raise RuntimeError("nothing works")

    __repr__ = __str__ = __bool__ = __float__ = __index__ = __len__ = __iter__ = __eq__ = __await__ = _raise
    __hash__ = None  # type: ignore[assignment]


def check(ended: Episode | DroppedEpisode) -> None:
    """Checks that a played episode can be trained on and dumped, and that a dropped one has a short one-line reason."""
    if isinstance(ended, DroppedEpisode):
        assert 0 < len(ended.error) < 1000 and ended.error.isprintable()
        return
    for attempt in ended.attempts:
        assert type(attempt.outcome) is float and 0 <= attempt.outcome <= 1
        assert type(attempt.success) is bool and type(attempt.summary) is str
        for turn in attempt.turns:
            assert type(turn.observation) is str and type(turn.action) in (str, type(None))
            (turn.observation + (turn.action or "") + attempt.summary).encode()
