"""The environment of tasks with one question and one answer: mathematics, generated puzzles, programs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from icrl_megatron.tasks.base import StepResult


@dataclass(frozen=True)
class Verdict:
    """What became of one answer."""

    right: bool
    remark: str
    """In words, for the critic."""


@dataclass(frozen=True)
class Form:
    """How an answer is written, and what is said when there is none."""

    find: Callable[[str], str | None]
    """The answer inside a reply; it reads megabytes of anything in linear time."""
    hint: str
    missing: str
    """The summary of an attempt without an answer."""


class SingleTurnEnvironment:
    """One question, one turn, reward 1 or 0. `judge` raises EnvironmentFailure when the judging itself failed."""

    max_turns = 1

    def __init__(self, question: str, form: Form, judge: Callable[[str], Awaitable[Verdict]]) -> None:
        self._question, self._form, self._judge = question, form, judge
        self._verdict: Verdict | None = None

    async def reset(self) -> str:
        self._verdict = None
        return self._question

    def parse(self, reply: str) -> str | None:
        return self._form.find(reply)

    def hint(self) -> str:
        return self._form.hint

    async def step(self, action: str) -> StepResult:
        self._verdict = await self._judge(action)
        return StepResult("", done=True)

    def outcome(self) -> float:
        return 1.0 if self.success() else 0.0

    def success(self) -> bool:
        return self._verdict is not None and self._verdict.right

    def summary(self) -> str:
        return self._form.missing if self._verdict is None else self._verdict.remark


def of_answer(right: bool, answer: str, what: str) -> Verdict:
    """The verdict on a short answer, which the remark repeats; `what` is how it is called."""
    return Verdict(right, f"The {what} is right." if right else f"The {what} {answer[:200]} is wrong.")
