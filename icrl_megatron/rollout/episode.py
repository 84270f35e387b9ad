"""Plays ICRL episodes, one or many at once.

    for round in 0..K-1:  attempt (with the latest critique, if any); stop if it succeeded or was the last; critique

If an episode's environment, grading or request fails, the episode is played once more and then dropped
(`DroppedEpisode`). An episode whose environment exceeded its time limit or returned an invalid value is dropped at
once. If an engine is lost, its episodes are played again (`UnplayedEpisode`). Wrong settings and other engine failures
end the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from icrl_megatron.engines.protocol import EngineLostError, RequestFailedError
from icrl_megatron.rollout.checked_environment import CheckedEnvironment, CheckedStep, ClippedText, LateFailure
from icrl_megatron.rollout.context_budget import TooLongError, require_fits
from icrl_megatron.rollout.prompts import PLAIN, Prompter, parse_critique
from icrl_megatron.rollout.replay import InterruptedEpisodeError
from icrl_megatron.rollout.speakers import Ask, Seeds, Speaker, SpeakersFor
from icrl_megatron.rollout.watchdog import WATCHDOG
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import BadAnswer, Environment, EnvironmentFailure, Opening
from icrl_megatron.types import (
    Attempt,
    Completion,
    Critique,
    DroppedEpisode,
    Episode,
    Ids,
    Role,
    StopReason,
    Task,
    Turn,
    UnplayedEpisode,
    id_array,
)

T = TypeVar("T")
Ended = Episode | DroppedEpisode | UnplayedEpisode


@dataclass(frozen=True)
class EpisodeSetup:
    """What all episodes of a run share."""

    environment: Callable[[Task], Environment]
    prompter: Prompter
    settings: RolloutSettings
    revise_successes: bool = False
    """Evaluation only: also critique and retry attempts that succeeded, to measure what critique breaks."""
    drop_too_long: bool = False
    """Drop an episode whose prompt leaves no room for a reply, instead of raising TooLongError."""

    def new_environment(self, task: Task) -> CheckedEnvironment:
        """A new environment for the task. Raises EnvironmentFailure."""
        settings = self.settings
        environment = CheckedEnvironment(
            task, self.environment, settings.environment_timeout_s, settings.max_observation_bytes
        )
        environment.limit_calls(settings.max_calls)
        return environment

    async def opened(self, environment: CheckedEnvironment) -> Opening:
        """The problem, after a reset, as the solver first reads it. Raises EnvironmentFailure."""
        return self.prompter.templates.opening(await environment.reset(), environment.manual)

    def shortened(self, text: ClippedText) -> tuple[str, int]:
        """(environment text cut to the token limits, number of characters cut)."""
        limit = min(self.settings.max_observation_tokens, self.settings.context_tokens)
        return self.prompter.shortened(text.text, limit, text.missing)


@dataclass(frozen=True)
class EpisodeKey:
    """Identifies an episode, for its seeds and messages."""

    task: Task
    index: int
    seeds: Seeds

    def seed(self, round: int, role: Role, turn: int) -> int:
        return self.seeds.of(self.task.task_id, self.index, round, role, turn)


async def play_episode(
    task: Task, index: int, setup: EpisodeSetup, speakers_for: SpeakersFor, seeds: Seeds
) -> Episode | DroppedEpisode:
    """Plays up to `rollout.rounds` attempts at one task.

    Raises TooLongError if a prompt does not fit `rollout.context_tokens` (unless `setup.drop_too_long`), and
    EngineError from the engine.
    """
    key = EpisodeKey(task, index, seeds)
    attempts: list[Attempt] = []
    critiques: list[Critique] = []
    try:
        with WATCHDOG.watching():
            speakers = speakers_for(task, index)
            environment = setup.new_environment(task)
            for round in range(setup.settings.rounds):
                advice = critiques[-1].text if critiques else None
                problem, attempt = await play_attempt(key, round, advice, environment, setup, speakers.solver)
                attempts.append(attempt)
                ended = attempt.success and not setup.revise_successes
                if ended or round + 1 == setup.settings.rounds:
                    break
                critiques.append(await play_critique(key, problem, attempt, setup, speakers.critic))
    except EnvironmentFailure as failure:
        bad, late = isinstance(failure, BadAnswer), isinstance(failure, LateFailure)
        return DroppedEpisode(task, index, str(failure), bad, late)
    except TooLongError as error:
        if not setup.drop_too_long:
            raise
        return DroppedEpisode(task, index, str(error), too_long=True)
    return Episode(task, index, tuple(attempts), tuple(critiques))


async def play_attempt(
    key: EpisodeKey,
    round: int,
    critique: str | None,
    environment: CheckedEnvironment,
    setup: EpisodeSetup,
    solver: Speaker,
) -> tuple[Opening, Attempt]:
    """Plays one attempt, starting with a reset. Returns (the problem as the solver first read it, the attempt).

    Raises EnvironmentFailure, ConfigError and EngineError as `play_episode` describes.
    """
    opening = await setup.opened(environment)
    problem, system, dialogue = opening.text, opening.system, environment.dialogue
    plain = setup.prompter.attempt(problem, dialogue, system)
    prompt = plain if critique is None else setup.prompter.revision(problem, critique, dialogue, system)
    role: Role = "attempt" if round == 0 else "revision"
    require_fits(key.task, role, len(prompt), setup.settings)
    conversation = _Conversation(key, round, role, critique, environment, setup, solver, prompt)
    stop_reason = await conversation.run(problem)
    success = environment.success()
    summary, missing = setup.shortened(environment.summary())
    turns, measures = tuple(conversation.turns), environment.measures()
    outcome = _reward(environment.outcome(), turns, measures, setup.settings)
    return opening, Attempt(
        round, id_array(prompt), id_array(plain), turns, outcome, success, summary, stop_reason, missing, measures
    )


def _reward(
    outcome: float, turns: Sequence[Turn], measures: Sequence[tuple[str, float]], settings: RolloutSettings
) -> float:
    """The environment's outcome less the cost of the attempt's calls and generated tokens, at least 0."""
    counted, tokens = dict(measures), sum(len(turn.completion.ids) for turn in turns)
    return max(0.0, outcome - settings.call_cost * counted.get("calls", 0.0) - settings.token_cost * tokens)


async def play_critique(
    key: EpisodeKey, opening: Opening, attempt: Attempt, setup: EpisodeSetup, critic: Speaker
) -> Critique:
    """Asks the critic for a critique of the attempt. The solver's system message is a part of the task that it reads.
    If the prompt does not fit the context, turns are left out (`PromptTemplates.kept`), then the end of the summary.

    Raises TooLongError if even the task and its outcome do not fit, and EngineError.
    """
    settings, problem = setup.settings, opening.joined()
    read = [setup.prompter.turn_text(i + 1, t.text, t.observation, t.action) for i, t in enumerate(attempt.turns)]
    turns, omitted, summary = read, 0, attempt.summary
    prompt = setup.prompter.critique(problem, turns, summary)
    while len(prompt) + settings.max_critique_tokens > settings.context_tokens and turns:
        omitted += 1
        turns = setup.prompter.templates.kept(read, omitted)
        prompt = setup.prompter.critique(problem, turns, summary, omitted)
    if len(prompt) >= settings.context_tokens:
        length = len(prompt) - len(setup.prompter.critique(problem, turns, "", omitted))
        summary, _ = setup.prompter.shortened(summary, max(0, length - 1 - len(prompt) + settings.context_tokens))
        prompt = setup.prompter.critique(problem, turns, summary, omitted)
    require_fits(key.task, "critique", len(prompt), settings)
    max_new_tokens = min(settings.max_critique_tokens, settings.context_tokens - len(prompt))
    seed = key.seed(attempt.round, "critique", 0)
    message = setup.prompter.critique_text(problem, turns, summary, omitted)
    ask = Ask("critique", prompt, max_new_tokens, seed, attempt.summary, None, message)
    completion = _require_tokens(await critic.reply(ask))
    text = parse_critique(setup.prompter.said(setup.prompter.decode(completion.ids)))
    return Critique(attempt.round, id_array(prompt), completion, text)


class _Conversation:
    """The turns of one attempt. The context only grows: by generated ids, and by text that is encoded once."""

    def __init__(
        self,
        key: EpisodeKey,
        round: int,
        role: Role,
        critique: str | None,
        environment: CheckedEnvironment,
        setup: EpisodeSetup,
        solver: Speaker,
        prompt: Ids,
    ) -> None:
        self.turns: list[Turn] = []
        self._key, self._round, self._role, self._critique = key, round, role, critique
        self._environment, self._setup, self._solver = environment, setup, solver
        self._context_ids = list(prompt)
        self._latest: str | None = None
        self._repeated = 0

    async def run(self, problem: str) -> StopReason:
        observation = problem
        limit = min(self._setup.settings.max_turns, self._environment.max_turns)
        for number in range(limit):
            completion = await self._ask(number, observation)
            text = self._setup.prompter.decode(completion.ids)
            if ended := self._cut_short(completion):
                self._end(completion, text, None, "")
                return ended
            inline = self._environment.dialogue != PLAIN  # a format of tool calls reads thoughts itself
            action = self._environment.parse(text if inline else self._setup.prompter.said(text))
            result = await self._step(action)
            stop = self._stop_reason(action, result, last=number + 1 == limit)
            observation, between, missing, chars = self._observed(result, completion)
            if stop is None and self._tokens_left() <= len(completion.ids) + len(between):
                stop = "context"
            if stop is not None:
                self._end(completion, text, action, observation, missing, chars)
                return stop
            self.turns.append(Turn(completion, text, action, observation, id_array(between), missing, chars))
            self._context_ids += [*completion.ids.tolist(), *between]
        raise AssertionError("the last turn always has a stop reason")

    def _cut_short(self, completion: Completion) -> StopReason | None:
        """Why the attempt ends with this reply before anything is read from it; None if it continues."""
        if completion.finish_reason == "abort":  # the attempt keeps what was generated so far
            return "deadline"
        if completion.finish_reason == "stop" or self._setup.settings.parse_truncated:
            return None
        return "context" if len(completion.ids) >= self._tokens_left() else "length"

    def _observed(self, result: CheckedStep, completion: Completion) -> tuple[str, Ids, int, tuple[int, ...]]:
        """(what the critic reads, ids between this reply and the next, number of characters cut, `answer_chars`)."""
        prompter, dialogue = self._setup.prompter, self._environment.dialogue
        if result.user and dialogue.observation == "tool":
            dialogue = replace(dialogue, observation="user")
        shortened = [self._setup.shortened(text) for text in result.observations]
        texts = [text for text, _ in shortened]
        between = prompter.observation_ids(texts, prompter.ended(completion.ids), dialogue)
        chars = tuple(map(len, texts)) if len(texts) > 1 else ()
        return "\n".join(texts), between, sum(missing for _, missing in shortened), chars

    async def _ask(self, number: int, observation: str) -> Completion:
        max_new_tokens = min(self._setup.settings.longest_turn(), self._tokens_left())
        seed, stop = self._key.seed(self._round, self._role, number), self._environment.dialogue.stop
        ask = Ask(self._role, tuple(self._context_ids), max_new_tokens, seed, observation, self._critique, stop=stop)
        return _require_tokens(await self._solver.reply(ask))

    async def _step(self, action: str | None) -> CheckedStep:
        if action is None:
            return CheckedStep((self._environment.hint(),), done=False)
        return await self._environment.step(action)

    def _stop_reason(self, action: str | None, result: CheckedStep, last: bool) -> StopReason | None:
        if action is not None or not self._setup.settings.repeats_over_invalid:
            self._repeated = self._repeated + 1 if action == self._latest else 1
            self._latest = action
        if result.done:
            return "done"
        if action is not None and self._repeated >= self._setup.settings.repeat_limit:
            return "repeated"
        return "max_turns" if last else None

    def _end(
        self,
        completion: Completion,
        text: str,
        action: str | None,
        observation: str,
        missing: int = 0,
        chars: tuple[int, ...] = (),
    ) -> None:
        self.turns.append(Turn(completion, text, action, observation, id_array(()), missing, chars))

    def _tokens_left(self) -> int:
        return self._setup.settings.context_tokens - len(self._context_ids)


def _require_tokens(completion: Completion) -> Completion:
    """Raises RequestFailedError if the reply was cut off before its first token, because then there is nothing to
    use."""
    if completion.finish_reason == "abort" and not len(completion.ids):
        raise RequestFailedError("A request was cut off before its first token: raise engine.request_timeout_s.")
    return completion


async def play(
    tasks: Sequence[Task],
    episodes: int,
    setup: EpisodeSetup,
    speakers_for: SpeakersFor,
    seeds: Seeds,
    on_end: Callable[[Ended], None] | None = None,
) -> tuple[list[Episode], list[DroppedEpisode]]:
    """Plays every task `episodes` times, as `play_all` does. Raises EngineLostError if the engine was lost."""
    results = await play_all([(t, i) for t in tasks for i in range(episodes)], setup, speakers_for, seeds, on_end)
    for unplayed in (r for r in results if isinstance(r, UnplayedEpisode)):
        raise EngineLostError(unplayed.error)
    played = [r for r in results if isinstance(r, Episode)]
    dropped = [r for r in results if isinstance(r, DroppedEpisode)]
    return played, dropped


async def play_all(
    pairs: Sequence[tuple[Task, int]],
    setup: EpisodeSetup,
    speakers_for: SpeakersFor,
    seeds: Seeds,
    on_end: Callable[[Ended], None] | None = None,
) -> list[Ended]:
    """Plays (task, episode index) pairs, at most `rollout.concurrency` at once. Results are in the order of `pairs`.
    `on_end` is called with each result when its episode ends (for progress bars).

    The first ConfigError or EngineError cancels the rest and is raised, except for errors that cost only their episode.
    """
    gate = asyncio.Semaphore(setup.settings.concurrency)

    async def one(task: Task, index: int) -> Ended:
        async with gate:
            result = await play_twice(task, index, setup, speakers_for, seeds)
        if on_end is not None:
            on_end(result)
        return result

    return await gather([one(task, index) for task, index in pairs])


async def play_twice(task: Task, index: int, setup: EpisodeSetup, speakers_for: SpeakersFor, seeds: Seeds) -> Ended:
    """Plays an episode. If its request or environment failed, plays it once more from the beginning in a new
    environment, then drops it. The comment below says which episodes are dropped at once."""
    for last in (False, True):
        try:
            ended = await play_episode(task, index, setup, speakers_for, seeds)
        except RequestFailedError as error:
            ended = DroppedEpisode(task, index, str(error))
        except EngineLostError as error:
            return UnplayedEpisode(task, index, str(error))
        except InterruptedEpisodeError:
            return UnplayedEpisode(task, index, "")
        # An invalid answer points to a wrong setup, and a second try would hide that. A call that timed out would time
        # out again, and a prompt that is too long stays too long.
        if last or isinstance(ended, Episode) or ended.bad_answer or ended.late or ended.too_long:
            break
    return ended


async def gather(jobs: Sequence[Awaitable[T]]) -> list[T]:
    """Results in the order of `jobs`. The first failure cancels the other jobs, waits for them, and is raised
    unchanged."""
    running = [asyncio.ensure_future(job) for job in jobs]
    try:
        return await asyncio.gather(*running)
    finally:
        for job in running:
            job.cancel()
        await asyncio.gather(*running, return_exceptions=True)
