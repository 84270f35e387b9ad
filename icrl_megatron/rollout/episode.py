"""One ICRL episode, and many at once.

    for round in 0..K-1:  attempt (with the latest critique, if any); stop if it succeeded or was the last; critique

An episode whose environment, grading or request fails is played once more, and then dropped (`DroppedEpisode`). One
whose environment took too long, or returned something else than it promised, is dropped at once. An engine that is
lost leaves its episodes to be played again (`UnplayedEpisode`); wrong settings and other engine failures end the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from icrl_megatron.engines.protocol import EngineLostError, RequestFailedError
from icrl_megatron.rollout.guard import GuardedEnvironment, LateFailure, Said, Stepped
from icrl_megatron.rollout.prompts import Prompter, parse_critique
from icrl_megatron.rollout.replay import InterruptedEpisodeError
from icrl_megatron.rollout.room import TooLongError, require_room
from icrl_megatron.rollout.speakers import Ask, Casting, Seeds, Speaker
from icrl_megatron.rollout.watchdog import WATCHDOG
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import BadAnswer, Environment, EnvironmentFailure
from icrl_megatron.types import (
    Attempt,
    Completion,
    Critique,
    DroppedEpisode,
    Episode,
    Ids,
    Role,
    Task,
    Turn,
    UnplayedEpisode,
)

T = TypeVar("T")
StopReason = Literal["done", "max_turns", "repeated", "context", "length", "deadline"]


Ended = Episode | DroppedEpisode | UnplayedEpisode


@dataclass(frozen=True)
class Stage:
    """What all episodes of a run share."""

    environment: Callable[[Task], Environment]
    prompter: Prompter
    settings: RolloutSettings
    revise_successes: bool = False
    """Evaluation only: critique and retry what succeeded too, to see what critique breaks."""
    drop_too_long: bool = False
    """Drop an episode with a prompt that leaves no room in the context, in place of raising TooLongError."""

    def guarded(self, task: Task) -> GuardedEnvironment:
        """A new environment of a task. Raises EnvironmentFailure."""
        settings = self.settings
        return GuardedEnvironment(
            task, self.environment, settings.environment_timeout_s, settings.max_observation_bytes
        )

    def shortened(self, said: Said) -> tuple[str, int]:
        """(a text of an environment as prompts may hold it, how many characters it lacks)."""
        limit = min(self.settings.max_observation_tokens, self.settings.context_tokens)
        return self.prompter.shortened(said.text, limit, said.missing)


@dataclass(frozen=True)
class Place:
    """Which episode this is: all that its seeds and its messages need."""

    task: Task
    index: int
    seeds: Seeds

    def seed(self, round: int, role: Role, turn: int) -> int:
        return self.seeds.of(self.task.task_id, self.index, round, role, turn)


async def play_episode(
    task: Task, index: int, stage: Stage, casting: Casting, seeds: Seeds
) -> Episode | DroppedEpisode:
    """Plays up to `rollout.rounds` attempts at one task.

    Raises TooLongError on a prompt that does not fit `rollout.context_tokens` unless such episodes are dropped, and
    EngineError from the engine.
    """
    place = Place(task, index, seeds)
    attempts: list[Attempt] = []
    critiques: list[Critique] = []
    try:
        with WATCHDOG.on_duty():
            cast = casting(task, index)
            environment = stage.guarded(task)
            for round in range(stage.settings.rounds):
                advice = critiques[-1].text if critiques else None
                problem, attempt = await play_attempt(place, round, advice, environment, stage, cast.solver)
                attempts.append(attempt)
                ended = attempt.success and not stage.revise_successes
                if ended or round + 1 == stage.settings.rounds:
                    break
                critiques.append(await play_critique(place, problem, attempt, stage, cast.critic))
    except EnvironmentFailure as failure:
        bad, late = isinstance(failure, BadAnswer), isinstance(failure, LateFailure)
        return DroppedEpisode(task, index, str(failure), bad, late)
    except TooLongError as error:
        if not stage.drop_too_long:
            raise
        return DroppedEpisode(task, index, str(error), too_long=True)
    return Episode(task, index, tuple(attempts), tuple(critiques))


async def play_attempt(
    place: Place, round: int, critique: str | None, environment: GuardedEnvironment, stage: Stage, solver: Speaker
) -> tuple[str, Attempt]:
    """One try, from a reset on: (the problem as the solver first read it, the attempt).

    Raises EnvironmentFailure, ConfigError and EngineError as `play_episode` describes.
    """
    problem = await environment.reset()
    plain = stage.prompter.attempt(problem)
    prompt = plain if critique is None else stage.prompter.revision(problem, critique)
    role: Role = "attempt" if round == 0 else "revision"
    require_room(place.task, role, len(prompt), stage.settings)
    conversation = _Conversation(place, round, role, critique, environment, stage, solver, prompt)
    stop_reason = await conversation.run(problem)
    success = environment.success()
    summary, missing = stage.shortened(environment.summary())
    outcome, turns, measures = environment.outcome(), tuple(conversation.turns), environment.measures()
    return problem, Attempt(round, prompt, plain, turns, outcome, success, summary, stop_reason, missing, measures)


async def play_critique(place: Place, problem: str, attempt: Attempt, stage: Stage, critic: Speaker) -> Critique:
    """The critic reads the attempt. What does not fit the context is left out: its first turns, then the end of the
    summary.

    Raises TooLongError when even the task and its outcome do not fit, and EngineError.
    """
    settings = stage.settings
    turns = [stage.prompter.turn_text(i + 1, turn.text, turn.observation) for i, turn in enumerate(attempt.turns)]
    omitted, summary = 0, attempt.summary
    prompt = stage.prompter.critique(problem, turns, summary)
    while len(prompt) + settings.max_critique_tokens > settings.context_tokens and omitted < len(turns):
        omitted += 1
        prompt = stage.prompter.critique(problem, turns[omitted:], summary, omitted)
    if len(prompt) >= settings.context_tokens:
        length = len(prompt) - len(stage.prompter.critique(problem, turns[omitted:], "", omitted))
        summary, _ = stage.prompter.shortened(summary, max(0, length - 1 - len(prompt) + settings.context_tokens))
        prompt = stage.prompter.critique(problem, turns[omitted:], summary, omitted)
    require_room(place.task, "critique", len(prompt), settings)
    room = min(settings.max_critique_tokens, settings.context_tokens - len(prompt))
    seed = place.seed(attempt.round, "critique", 0)
    message = stage.prompter.critique_text(problem, turns[omitted:], summary, omitted)
    ask = Ask("critique", prompt, room, seed, attempt.summary, None, message)
    completion = _something(await critic.reply(ask))
    text = parse_critique(stage.prompter.decode(completion.ids))
    return Critique(attempt.round, prompt, completion, text)


class _Conversation:
    """The turns of one attempt; the context only ever grows by ids that were generated or are encoded once."""

    def __init__(
        self,
        place: Place,
        round: int,
        role: Role,
        critique: str | None,
        environment: GuardedEnvironment,
        stage: Stage,
        solver: Speaker,
        prompt: Ids,
    ) -> None:
        self.turns: list[Turn] = []
        self._place, self._round, self._role, self._critique = place, round, role, critique
        self._environment, self._stage, self._solver = environment, stage, solver
        self._context = list(prompt)
        self._repeated = 0

    async def run(self, problem: str) -> StopReason:
        observation = problem
        limit = min(self._stage.settings.max_turns, self._environment.max_turns)
        for number in range(limit):
            completion = await self._ask(number, observation)
            text = self._stage.prompter.decode(completion.ids)
            if completion.finish_reason != "stop":
                self._end(completion, text, None, "")
                if completion.finish_reason == "abort":  # what was generated by then counts; the attempt ends here
                    return "deadline"
                return "context" if len(completion.ids) >= self._room() else "length"
            action = self._environment.parse(text)
            result = await self._step(action)
            stop = self._stop_reason(action, result, last=number + 1 == limit)
            observation, missing = self._stage.shortened(result.observation)
            between = self._stage.prompter.observation_ids(observation, self._stage.prompter.ended(completion.ids))
            if stop is None and self._room() <= len(completion.ids) + len(between):
                stop = "context"
            if stop is not None:
                self._end(completion, text, action, observation, missing)
                return stop
            self.turns.append(Turn(completion, text, action, observation, between, missing))
            self._context += [*completion.ids, *between]
        raise AssertionError("the last turn always has a stop reason")

    async def _ask(self, number: int, observation: str) -> Completion:
        room = min(self._stage.settings.max_turn_tokens, self._room())
        seed = self._place.seed(self._round, self._role, number)
        ask = Ask(self._role, tuple(self._context), room, seed, observation, self._critique)
        return _something(await self._solver.reply(ask))

    async def _step(self, action: str | None) -> Stepped:
        if action is None:
            return Stepped(self._environment.hint(), done=False)
        return await self._environment.step(action)

    def _stop_reason(self, action: str | None, result: Stepped, last: bool) -> StopReason | None:
        same = action is not None and bool(self.turns) and self.turns[-1].action == action
        self._repeated = self._repeated + 1 if same else 1
        if result.done:
            return "done"
        if action is not None and self._repeated >= self._stage.settings.repeat_limit:
            return "repeated"
        return "max_turns" if last else None

    def _end(self, completion: Completion, text: str, action: str | None, observation: str, missing: int = 0) -> None:
        self.turns.append(Turn(completion, text, action, observation, (), missing))

    def _room(self) -> int:
        return self._stage.settings.context_tokens - len(self._context)


def _something(completion: Completion) -> Completion:
    """Raises RequestFailedError when a reply was cut off before its first token: nothing to go on with."""
    if completion.finish_reason == "abort" and not completion.ids:
        raise RequestFailedError("A request was cut off before its first token: raise engine.request_timeout_s.")
    return completion


async def play(
    tasks: Sequence[Task],
    episodes: int,
    stage: Stage,
    casting: Casting,
    seeds: Seeds,
    on_end: Callable[[Ended], None] | None = None,
) -> tuple[list[Episode], list[DroppedEpisode]]:
    """Plays every task `episodes` times, as `play_all` does. Raises EngineLostError when the engine was lost."""
    results = await play_all([(t, i) for t in tasks for i in range(episodes)], stage, casting, seeds, on_end)
    for unplayed in (r for r in results if isinstance(r, UnplayedEpisode)):
        raise EngineLostError(unplayed.error)
    played = [r for r in results if isinstance(r, Episode)]
    dropped = [r for r in results if isinstance(r, DroppedEpisode)]
    return played, dropped


async def play_all(
    places: Sequence[tuple[Task, int]],
    stage: Stage,
    casting: Casting,
    seeds: Seeds,
    on_end: Callable[[Ended], None] | None = None,
) -> list[Ended]:
    """Plays (task, episode index) pairs, at most `rollout.concurrency` at once. Results are in the order of `places`,
    whatever ended first; `on_end` hears of each as it ends (for progress bars).

    The first ConfigError or EngineError cancels the rest and is raised, but for those that cost episodes alone.
    """
    gate = asyncio.Semaphore(stage.settings.concurrency)

    async def one(task: Task, index: int) -> Ended:
        async with gate:
            result = await _play_twice(task, index, stage, casting, seeds)
        if on_end is not None:
            on_end(result)
        return result

    return await gather([one(task, index) for task, index in places])


async def _play_twice(task: Task, index: int, stage: Stage, casting: Casting, seeds: Seeds) -> Ended:
    """An episode that failed, by a request or by its environment, is played once more, from its beginning and in an
    environment of its own, and then dropped; see below for what is dropped at once."""
    for last in (False, True):
        try:
            ended = await play_episode(task, index, stage, casting, seeds)
        except RequestFailedError as error:
            ended = DroppedEpisode(task, index, str(error))
        except EngineLostError as error:
            return UnplayedEpisode(task, index, str(error))
        except InterruptedEpisodeError:
            return UnplayedEpisode(task, index, "")
        # An answer that cannot be true says that something is set up wrongly: a second try would hide it. A call that
        # used up its time would do so again, and a prompt that is too long stays too long.
        if last or isinstance(ended, Episode) or ended.bad_answer or ended.late or ended.too_long:
            break
    return ended


async def gather(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """Results in the order of `jobs`; the first failure cancels the others, waits for them, and is raised as it is."""
    running = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*running)
    finally:
        for job in running:
            job.cancel()
        await asyncio.gather(*running, return_exceptions=True)
