"""Tasks with one question and one answer: mathematics, generated puzzles, programs.

An attempt ends with its first answer. Unless the task set allows more turns, it ends with the first reply.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from icrl_megatron.settings.task_options import DataSource
from icrl_megatron.settings.task_sections import TrainAndHeldout
from icrl_megatron.tasks.base import Environment, Opening, StepResult, own_problem
from icrl_megatron.types import Split, Task


@dataclass(frozen=True)
class Verdict:
    """The judgment of one answer."""

    right: bool
    remark: str
    """The reason, for the critic."""


@dataclass(frozen=True)
class Form:
    """The format of an answer, and the texts for a missing one."""

    find: Callable[[str], str | None]
    """Finds the answer in a reply, in linear time even for megabytes of any text."""
    hint: str
    missing: str
    """The summary of an attempt without an answer."""
    manual: str = ""
    """As in `tasks.base.Environment`."""


AnswerCheck = Callable[[str], Awaitable[Verdict]]
"""An answer -> its verdict. Raises EnvironmentFailure if the judging itself failed."""


class OneAnswerEnvironment:
    """One question, one answer within `max_turns` replies, reward 1 or 0."""

    def __init__(self, question: str | Opening, form: Form, check: AnswerCheck, max_turns: int = 1) -> None:
        self.max_turns, self.manual = max_turns, form.manual
        self._question, self._form, self._check = question, form, check
        self._verdict: Verdict | None = None

    async def reset(self) -> str | Opening:
        self._verdict = None
        return self._question

    def parse(self, reply: str) -> str | None:
        return self._form.find(reply)

    def hint(self) -> str:
        return self._form.hint

    async def step(self, action: str) -> StepResult:
        self._verdict = await self._check(action)
        return StepResult("", done=True)

    def outcome(self) -> float:
        return 1.0 if self.success() else 0.0

    def success(self) -> bool:
        return self._verdict is not None and self._verdict.right

    def summary(self) -> str:
        return self._form.missing if self._verdict is None else self._verdict.remark

    def measures(self) -> dict[str, float]:
        return {"answered": float(self._verdict is not None)}


class SingleTurnTasks(ABC):
    """A task set (`tasks.base.TaskSet`) of such questions. Its problems are JSON objects, loaded once per split."""

    form: ClassVar[Form]
    data: TrainAndHeldout
    turns = 1
    """Replies in which the answer may appear."""

    def __init__(self, source: DataSource) -> None:
        self.name, self.data = source.name, source.data
        self._problems: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        if split not in self._problems:
            self._problems[split] = self.load(split)
        return self._problems[split]

    def environment(self, task: Task) -> Environment:
        question, check = self._asked(task)
        return OneAnswerEnvironment(question, self.form, check, self.turns)

    def statement(self, task: Task) -> str | Opening:
        return self._asked(task)[0]

    def _asked(self, task: Task) -> tuple[str | Opening, AnswerCheck]:
        with own_problem(self, task):
            problem = json.loads(task.problem)
            text, check = self.question(problem)
            return Opening.plain(text, problem.get("system", "")), check

    @abstractmethod
    def load(self, split: Split) -> list[Task]:
        """All problems of a split. Raises ConfigError if there are none, or their source is damaged."""

    @abstractmethod
    def question(self, problem: dict[str, Any]) -> tuple[str, AnswerCheck]:
        """(prompt, check of answers to it). Raises KeyError or TypeError on an invalid problem."""


def of_answer(right: bool, answer: str, what: str) -> Verdict:
    """The verdict on a short answer, which the remark repeats; `what` names the answer."""
    return Verdict(right, f"The {what} is right." if right else f"The {what} {answer[:200]} is wrong.")
