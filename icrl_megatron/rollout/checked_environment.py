"""Calls the code of tasks. Whatever that code returns, raises or does costs at most one episode.

Every call goes through `Caller`, which limits its time, converts the return value to exactly the promised type, and
turns everything else into an EnvironmentFailure. Callers of this module need no further checks.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import operator
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from icrl_megatron.agents.dialogue import Dialogue
from icrl_megatron.rollout.background import Overrun
from icrl_megatron.rollout.watchdog import WATCHDOG, Raised, Watched, first_step
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import (
    BadAnswer,
    Environment,
    EnvironmentFailure,
    Opening,
    StepResult,
    escaped,
    sendable,
    shown,
)
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError

T = TypeVar("T")


class LateFailure(EnvironmentFailure):
    """A call exceeded its time limit. It is not retried, because it would hang for as long again."""


class WrongReturnError(Exception):
    """A value is not of the promised type or range; the message says what it must be."""


@dataclass(frozen=True)
class ClippedText:
    """Text from an environment, cut at the byte limit."""

    text: str
    missing: int
    """Number of characters cut from the end."""


@dataclass(frozen=True)
class CheckedStep:
    """A validated `StepResult`."""

    observations: tuple[ClippedText, ...]
    """One, or one per tool call of the reply."""
    done: bool
    user: bool = False


@dataclass(frozen=True)
class Caller:
    """Calls the code of one task."""

    task: Task
    timeout_s: float

    def call(self, what: str, code: Callable[[], object], read: Callable[[Any], T]) -> T:
        """Returns `read(code())`. `what` names the call in messages.

        Raises EnvironmentFailure; its subclass BadAnswer if `read` rejects the value; its subclass LateFailure if the
        call exceeds the time limit; and any ConfigError that the code raises.
        """
        try:
            return WATCHDOG.run(lambda: self._converted(what, code(), read), Watched(self.timeout_s))
        except (Raised, Overrun) as error:
            raise self._failure(what, error) from None

    async def wait(self, what: str, code: Callable[[], object], read: Callable[[Any], T]) -> T:
        """The same for code that returns an awaitable, which is awaited within the time limit."""
        begun, watched, awaited = time.monotonic(), Watched(self.timeout_s), self._awaited(what, code, read)
        try:
            returned, found = WATCHDOG.run(lambda: first_step(awaited), watched)
        except (Raised, Overrun) as error:
            awaited.close()
            raise self._failure(what, error) from None
        if returned:
            return found
        return await self._rest(what, awaited, watched, found, self.timeout_s + begun - time.monotonic())

    async def _rest(
        self, what: str, awaited: Coroutine[Any, Any, T], watched: Watched, yielded: Any, left_s: float
    ) -> T:
        task = asyncio.current_task()
        assert task is not None
        cancelled, watched.own = task.cancelling(), asyncio.timeout(left_s)
        try:
            async with watched.own as limit:
                found = await WATCHDOG.drive(awaited, watched, yielded)
        except (Raised, Overrun, TimeoutError) as error:
            if task.cancelling() > cancelled:  # the code replaced the cancellation by another error
                raise asyncio.CancelledError from error
            if watched.blocked or limit.expired():
                raise self._late(what, watched.blocked) from None
            raise self._failure(what, error) from None
        if task.cancelling() > cancelled:  # the code ignored the cancellation
            raise asyncio.CancelledError
        if limit.expired():
            raise self._late(what)
        return found

    async def _awaited(self, what: str, code: Callable[[], object], read: Callable[[Any], T]) -> T:
        return self._converted(what, await self._converted(what, code(), _awaitable), read)

    def _converted(self, what: str, value: object, read: Callable[[Any], T]) -> T:
        try:
            return read(value)
        except WrongReturnError as error:
            raise BadAnswer(
                f"{what} of task {self.task.task_id!r} (task set {self.task.source!r}) is {shown(value)}: {error}"
            ) from None

    def _late(self, what: str, blocked: bool = False) -> LateFailure:
        if blocked and WATCHDOG.stopping:
            return LateFailure(f"{what} blocked a run that was asked to stop")
        return LateFailure(f"{what} took longer than rollout.environment_timeout_s = {self.timeout_s} s")

    def _failure(self, what: str, error: BaseException) -> Exception:
        """The exception to raise instead of what the code raised."""
        raised = error.error if isinstance(error, Raised) else error
        if isinstance(raised, Overrun):
            return self._late(what, blocked=True)
        if isinstance(raised, ConfigError):
            return raised
        try:
            text = WATCHDOG.run(lambda: escaped(str(raised)), Watched(self.timeout_s))
        except (Raised, Overrun):
            text = "(an error that cannot be shown)"
        if isinstance(raised, EnvironmentFailure):
            return (BadAnswer if isinstance(raised, BadAnswer) else EnvironmentFailure)(text)
        return EnvironmentFailure(f"{what} raised {type(raised).__name__}: {text}")


class CheckedEnvironment:
    """An environment whose failures are all `EnvironmentFailure` and whose return values have the promised types.

    Every method raises EnvironmentFailure, as `Caller` does.
    """

    def __init__(
        self,
        task: Task,
        factory: Callable[[Task], Environment],
        timeout_s: float,
        max_bytes: int = RolloutSettings.max_observation_bytes,
    ) -> None:
        """`max_bytes`: `rollout.max_observation_bytes`, the longest text that is kept, in bytes of UTF-8."""
        self._caller, self._max_bytes = Caller(task, timeout_s), max_bytes
        self._environment = self._caller.call("construction", lambda: factory(task), _environment)
        self.dialogue: Dialogue = self._caller.call("dialogue", lambda: self._environment, _dialogue)
        self.manual = self._caller.call("manual", lambda: getattr(self._environment, "manual", ""), self._whole)
        """Empty for an environment without one."""
        self.max_turns = self._caller.call("max_turns", lambda: self._environment.max_turns, _turns)

    def limit_calls(self, most: int | None) -> None:
        """Sets `rollout.max_calls`; an environment without `limit_calls` makes no calls."""
        limit = getattr(self._environment, "limit_calls", None)
        if most is not None and limit is not None:
            self._caller.call("limit_calls", lambda: limit(most), lambda value: None)

    async def reset(self) -> Opening:
        """The whole problem, because part of it would be another problem. Raises BadAnswer if it is too long."""
        texts = await self._caller.wait("reset", lambda: self._environment.reset(), self._opening)
        if any(text.missing for text in texts):
            raise BadAnswer(
                f"reset() of task {self._caller.task.task_id!r} returned a problem of more than "
                f"rollout.max_observation_bytes = {self._max_bytes} bytes: raise that, or shorten the problem"
            )
        return Opening(*(text.text for text in texts))

    async def step(self, action: str) -> CheckedStep:
        return await self._caller.wait("step", lambda: self._environment.step(action), self._step)

    def parse(self, reply: str) -> str | None:
        return self._caller.call("parse", lambda: self._environment.parse(reply), self._action)

    def hint(self) -> ClippedText:
        return self._caller.call("hint", lambda: self._environment.hint(), self._text)

    def success(self) -> bool:
        return self._caller.call("success", lambda: self._environment.success(), _truth)

    def summary(self) -> ClippedText:
        return self._caller.call("summary", lambda: self._environment.summary(), self._text)

    def outcome(self) -> float:
        return self._caller.call("outcome", lambda: self._environment.outcome(), _reward)

    def measures(self) -> tuple[tuple[str, float], ...]:
        """What the environment counted, sorted by name; nothing from one without `measures`."""
        return self._caller.call("measures", lambda: getattr(self._environment, "measures", dict)(), _measures)

    def _text(self, value: object, name: str = "it") -> ClippedText:
        whole = text_of(value, name)
        if 4 * len(whole) <= self._max_bytes:
            return ClippedText(sendable(whole), 0)
        begin = sendable(whole[: self._max_bytes]).encode()[: self._max_bytes].decode(errors="ignore")
        return ClippedText(begin, len(whole) - len(begin))

    def _opening(self, value: object) -> tuple[ClippedText, ClippedText]:
        """(problem, system message)."""
        if isinstance(value, Opening):
            return self._text(value.text, "its text"), self._text(value.system, "its system")
        return self._text(value), ClippedText("", 0)

    def _step(self, value: object) -> CheckedStep:
        if not isinstance(value, StepResult):
            raise WrongReturnError("it must be a StepResult(observation, done)")
        given = value.observation if isinstance(value.observation, tuple) else (value.observation,)
        if not 1 <= len(given) <= MOST_OBSERVATIONS:
            raise WrongReturnError(f"its observation must be a str, or a tuple of 1 to {MOST_OBSERVATIONS} of them")
        texts = tuple(self._text(text, "its observation") for text in given)
        return CheckedStep(texts, _truth(value.done, "its done"), _truth(value.user, "its user"))

    def _action(self, value: object) -> str | None:
        return None if value is None else self._whole(value)

    def _whole(self, value: object) -> str:
        """A text that must not be cut."""
        text = self._text(value)
        if text.missing:
            raise WrongReturnError(f"it must have at most rollout.max_observation_bytes = {self._max_bytes} bytes")
        return text.text


def text_of(value: object, name: str = "it") -> str:
    """A plain str. Raises WrongReturnError for anything else, bytes included."""
    if not isinstance(value, str):
        raise WrongReturnError(f"{name} must be a str")
    return str.__str__(value)  # copies an instance of a str subclass, whose methods may do anything


def _environment(value: Any) -> Environment:
    if inspect.iscoroutine(value):
        value.close()
    missing = [name for name in _METHODS if not callable(getattr(value, name, None))]
    if missing or inspect.isclass(value):
        raise WrongReturnError(f"it must be an environment, an object with the methods {', '.join(_METHODS)}")
    return value


_METHODS = ("reset", "parse", "hint", "step", "outcome", "success", "summary")


MOST_OBSERVATIONS = 32


def _dialogue(value: Any) -> Dialogue:
    """The environment's `dialogue`; the default for one without it."""
    found = getattr(value, "dialogue", Dialogue())
    if not isinstance(found, Dialogue):
        raise WrongReturnError("its dialogue must be an icrl_megatron.agents.dialogue.Dialogue")
    return found


def _awaitable(value: object) -> Awaitable[Any]:
    if not inspect.isawaitable(value):
        raise WrongReturnError("it must be awaitable; write it as `async def`")
    return value


def _turns(value: Any) -> int:
    whole = hasattr(type(value), "__index__") and not isinstance(value, bool | np.bool_)
    if not whole or (turns := operator.index(value)) < 1:
        raise WrongReturnError("it must be a whole number of at least 1")
    return turns


def _truth(value: object, name: str = "it") -> bool:
    if not isinstance(value, bool | np.bool_):
        raise WrongReturnError(f"{name} must be True or False")
    return bool(value)


def _reward(value: Any) -> float:
    is_number: bool = isinstance(value, numbers.Real)
    if not is_number or not 0 <= value <= 1:  # NaN fails every comparison
        raise WrongReturnError("it must be a finite number in [0, 1]; divide scores by their maximum")
    return float(value)


MOST_MEASURES, MEASURE_NAME = 50, re.compile(r"[a-z0-9_]{1,60}")


def _measures(value: Any) -> tuple[tuple[str, float], ...]:
    fine = isinstance(value, dict) and len(value) <= MOST_MEASURES
    if not fine or not all(isinstance(name, str) and MEASURE_NAME.fullmatch(name) for name in value):
        raise WrongReturnError(
            f"it must be a dict of at most {MOST_MEASURES} names of lower-case letters, digits and _"
        )
    if not all(isinstance(number, numbers.Real) and math.isfinite(number) for number in value.values()):
        raise WrongReturnError("its values must be finite numbers")
    return tuple(sorted((str(name), float(number)) for name, number in value.items()))
