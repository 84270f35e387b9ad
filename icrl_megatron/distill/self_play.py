"""One model as the system: it attempts a problem as the solver, criticizes a failed attempt as ICRL's critic, and tries
again. An episode becomes a run of three authors, who know what their prompts had: the critic has read the attempt, the
revision only the critique.

    attempt's calls -> suggested_answer -> double_check "1 CRITIQUE" -> revision's calls -> answer
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icrl_megatron.agents.formats import FinalAnswer, Malformed, ToolCalls, harmless
from icrl_megatron.agents.tools import ToolCall
from icrl_megatron.distill import roles
from icrl_megatron.distill.afm import tagged_parts
from icrl_megatron.distill.environments import with_tools
from icrl_megatron.distill.events import Event, Failed, Run
from icrl_megatron.distill.own_server import check_engine
from icrl_megatron.distill.rows import BadRowError
from icrl_megatron.distill.timing import AttemptClock
from icrl_megatron.distill.trajectory import ASSISTANT, USER, SegmentKind, Tokens
from icrl_megatron.engines.kind import EngineRequest
from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.rollout.episode import Ended, EpisodeSetup, play_all
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.rollout.speakers import Ask, EngineSpeaker, Seeds, Speaker, Speakers, SpeakersFor, same_speakers
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks.base import Environment, ReadsCalls
from icrl_megatron.types import Attempt, Completion, DroppedEpisode, Episode, Task, Turn, UnplayedEpisode
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.progress import Progress

SOLVER, CRITIC = "solver", "critic"
WRONG = "1"
"""The score that a check begins with: the critic is asked only about attempts that failed."""


@dataclass(frozen=True)
class SelfPlay:
    """A model on an engine. `play` has the results of any number of attempts."""

    setup: EpisodeSetup
    speakers_for: SpeakersFor
    seeds: Seeds

    def play(self, jobs: Iterable[tuple[Task, int]], done: Callable[[Run | Failed], None]) -> None:
        """Plays (task, attempt) pairs, at most `rollout.concurrency` at a time, and passes each result to `done` as it
        comes. Raises HopelessError if the engine fails, and what `done` raises."""

        clocks = dict[tuple[str, int], AttemptClock]()
        opened = dict[asyncio.Task[Any] | None, Environment]()  # each episode is played in a task of its own

        def environment(task: Task) -> Environment:
            opened[asyncio.current_task()] = made = self.setup.environment(task)
            return made

        def speakers_for(task: Task, index: int) -> Speakers:
            clock = clocks[task.task_id, index] = AttemptClock()  # an episode that failed is played again
            speakers = self.speakers_for(task, index)
            return Speakers(_Timed(speakers.solver, SOLVER, clock), _Timed(speakers.critic, CRITIC, clock))

        def ended(result: Ended) -> None:
            if isinstance(result, UnplayedEpisode):
                raise EngineError(result.error)
            timing = clocks.pop((result.task.task_id, result.index)).read()
            found = _result(result, opened.pop(asyncio.current_task(), None))
            done(replace(found, timing=timing) if isinstance(found, Run) else found)

        try:
            setup = replace(self.setup, environment=environment)
            asyncio.run(play_all(list(jobs), setup, speakers_for, self.seeds, ended))
        except EngineError as error:
            raise HopelessError(str(error)) from error


def _result(ended: Episode | DroppedEpisode, environment: Environment | None) -> Run | Failed:
    if isinstance(ended, DroppedEpisode):
        kind = "too_long" if ended.too_long else "environment"
        return Failed(ended.task.task_id, ended.index, kind, ended.error)
    assert environment is not None
    return run_of(ended, with_tools(environment, ended.task))


@dataclass(frozen=True)
class _Timed:
    speaker: Speaker
    agent: str
    clock: AttemptClock

    async def reply(self, ask: Ask) -> Completion:
        with self.clock.waiting(self.agent):
            return await self.speaker.reply(ask)


def check(settings: Settings) -> None:
    """Raises ConfigError if `playing` would not work with these settings."""
    if not settings.model.path:
        raise ConfigError("distill.system=model: model.path is empty; set it to the folder of the model that plays")
    if settings.rollout.critic != "self":
        raise ConfigError(
            f"rollout.critic={settings.rollout.critic} with distill.system=model, where the model is its own critic: "
            "only rollout.critic=self works"
        )
    if settings.engine.urls:
        raise ConfigError("distill.system=model starts its own engine, and engine.urls is set: leave it empty")
    if settings.launch.engine_ranks:
        raise ConfigError(
            f"launch.engine_ranks={settings.launch.engine_ranks} with distill.system=model, which trains nothing: set "
            "launch.engine_ranks=0"
        )
    check_engine(settings)


@contextmanager
def playing(
    settings: Settings, environment: Callable[[Task], Environment], logs: Path, progress: Progress
) -> Iterator[SelfPlay]:
    """Starts the engine with `model.path`. Raises ConfigError, and HopelessError if it does not start."""
    from icrl_megatron.distributed import grid, platform  # lazy: import torch
    from icrl_megatron.distributed.platform import DTYPES

    device, folder = platform.prepare(settings.launch.device), Path(settings.model.path)
    prompter = Prompter(tokenizer(folder), settings.rollout)
    request = EngineRequest(
        settings, folder, grid.without_model(settings), DTYPES[settings.actor.precision], device, logs, synced=False
    )
    setup = EpisodeSetup(environment, prompter, settings.rollout, drop_too_long=True)
    try:
        with closing(engine_kind(settings.engine.kind).build(request)) as engines:
            with progress.phase("engine") as bar:
                engines.wait_ready(lambda: bar.advance(0))
                engines.wake()
            assert engines.solver is not None
            speaker = EngineSpeaker(engines.solver, settings.rollout.temperature, prompter.stop_ids)
            yield SelfPlay(setup, same_speakers(speaker), Seeds(settings.seed, 0, "distill"))
    except EngineError as error:
        raise HopelessError(str(error)) from error


def run_of(episode: Episode, environment: ReadsCalls) -> Run:
    """The run of an episode. `environment` is the one in which it was played; it is only read."""
    writer = _Writer(environment)
    for number, attempt in enumerate(episode.attempts):
        last = number == len(episode.attempts) - 1
        writer.attempt(attempt, last)
        if not last:
            critique = episode.critiques[number]
            writer.critique(critique.text, len(critique.prompt_ids), len(critique.completion.ids))
    opening = environment.opening
    return Run(
        episode.task.task_id,
        episode.index,
        opening.text,
        tuple(writer.events),
        episode.attempts[-1].success,
        writer.spent,
        tuple(environment.specs),
        environment.stateful,
        unreadable=writer.unreadable,
        system=opening.system,
    )


class _Writer:
    """Collects the events of an episode. Each attempt and each critique is a thread."""

    def __init__(self, environment: ReadsCalls) -> None:
        self.events, self.spent, self.unreadable = list[Event](), dict[str, Tokens](), 0
        self._form, self._tools = environment.form, [spec.name for spec in environment.specs]
        self._thread, self._read = 0, list[int]()

    def attempt(self, attempt: Attempt, last: bool) -> None:
        context = len(attempt.prompt_ids)
        for number, turn in enumerate(attempt.turns):
            written = len(turn.completion.ids)
            self._spend(SOLVER, context, written)
            context += written + len(turn.observation_ids)
            self._turn(turn, last, ends=number == len(attempt.turns) - 1)
        self._thread += 1

    def critique(self, text: str, read: int, written: int) -> None:
        """A check of the suggested answer; without an answer, a reflection."""
        self._spend(CRITIC, read, written)
        text = harmless(text.strip(), self._form.tags)[0]
        checks = bool(self.events) and self.events[-1].tag == roles.SUGGESTION
        tag, text = (roles.CHECK, f"{WRONG} {text}".strip()) if checks else (roles.REFLECTION, text)
        self._read = [self._say(CRITIC, tag, "text", text)] if text else []
        self._thread += 1

    def _turn(self, turn: Turn, last: bool, ends: bool) -> None:
        said = self._said(turn)
        if said is None:
            self.unreadable += 1
            return
        texts, action = said
        for tag, text in texts:
            self._say(SOLVER, tag, "text", text)
        if isinstance(action, FinalAnswer):
            if last or not ends:
                said_at = self._say(SOLVER, roles.ANSWER, "answer", action.text)
                if not ends:  # a user said more
                    self._observe(USER, USER, turn.observation, said_at)
            else:
                self._say(SOLVER, roles.SUGGESTION, "text", action.text)
            return
        called = [self._say(SOLVER, call.name, "call", "", call) for call in action.calls]
        for call, asked, answer in zip(action.calls, called, _answers(turn), strict=True):
            self._observe(SOLVER, call.name, answer, asked)

    def _observe(self, agent: str, tag: str, text: str, asked: int) -> None:
        self.events.append(Event(agent, tag, "observation", text, (asked,), self._thread))
        self._read.append(len(self.events) - 1)

    def _said(self, turn: Turn) -> tuple[list[tuple[str, str]], ToolCalls | FinalAnswer] | None:
        """(tag and text of what stands beside the calls or the answer, those); None for a reply that holds neither, or
        that would be read in another way once it is written again."""
        found = self._form.parse(turn.text) if turn.action is not None else None
        if found is None or isinstance(found, Malformed):
            return None
        try:
            parts = tagged_parts(turn.text)
        except BadRowError:
            return None
        own = {roles.ANSWER, "tool_call", *self._tools}
        free = isinstance(found, ToolCalls)  # beside an answer, text may be the answer
        texts = [(t or ASSISTANT, b.strip()) for t, b in parts if t not in own and b.strip() and (t or free)]
        answer = [found.text] if isinstance(found, FinalAnswer) else []
        if any(harmless(text, self._form.tags)[1] for text in (*answer, *(text for _, text in texts))):
            return None
        return texts, found

    def _say(self, agent: str, tag: str, kind: SegmentKind, text: str, call: ToolCall | None = None) -> int:
        self.events.append(Event(agent, tag, kind, text, tuple(self._read), self._thread, call))
        self._read.append(len(self.events) - 1)
        return len(self.events) - 1

    def _spend(self, agent: str, read: int, written: int) -> None:
        before = self.spent.get(agent, Tokens())
        self.spent[agent] = Tokens(before.read + read, before.written + written)


def _answers(turn: Turn) -> Iterator[str]:
    """The answers to a reply's calls."""
    start = 0
    for chars in turn.answer_chars or (len(turn.observation),):
        yield turn.observation[start : start + chars]
        start += chars + 1
