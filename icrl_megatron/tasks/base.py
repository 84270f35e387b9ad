"""The interfaces of task sets: problems, environments, teachers and checks.

A new task is one file with one class that satisfies `TaskSet`, and one line in `registry.py`.
"""

from __future__ import annotations

import random
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.agents.formats import ToolFormat
from icrl_megatron.agents.judge import Asker
from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError, EnvironmentFailure


@dataclass(frozen=True)
class StepResult:
    """The environment's answer to one action."""

    observation: str | tuple[str, ...]
    """Several: one per tool call of the reply, in order."""
    done: bool
    user: bool = False
    """A user message answers a reply, also where the answers to calls are tool messages: what a user says next."""

    def texts(self) -> tuple[str, ...]:
        return self.observation if isinstance(self.observation, tuple) else (self.observation,)


@dataclass(frozen=True)
class Opening:
    """A problem with a system message. Without one, the problem's `str` is enough.

    Example: Opening("What is 2 + 2?", "You are a careful calculator.")
    """

    text: str
    """The problem, which the solver reads as the first user message."""
    system: str = ""
    """The system message in front of it; empty: none."""

    @staticmethod
    def of(given: str | Opening) -> Opening:
        return Opening(given) if isinstance(given, str) else given

    @staticmethod
    def plain(text: str, system: str) -> str | Opening:
        """A `str` if there is no system message."""
        return Opening(text, system) if system else text

    def joined(self) -> str:
        """Both as one text, for readers who have a system message of their own or none: critics, judges, teams."""
        return f"{self.system}\n\n{self.text}" if self.system else self.text


class Environment(Protocol):
    """One playable problem. An instance belongs to one attempt at a time; `reset` restarts the same problem.

    `reset` and `step` are coroutines because environments may be behind a network; the embedded ones never wait.
    Infrastructure failures raise `EnvironmentFailure`: they cost the episode and never become a reward of 0. The same
    applies to any other exception of a method, a return value of another type, and a call that takes too long
    (`rollout/checked_environment.py`).

    An environment may also have:

    measures()          finite numbers by name, of the attempt so far. Their means are logged as task/<name>
    manual              a text: what the environment is, and all actions in the form in which a reply must have them,
                        for templates with a system message (`rollout.templates=paper`). The same for every problem of a
                        task set. Other templates do not show it, so the problem must still say what is needed
    dialogue            a `Dialogue`: how turns become tokens, for example because the model calls tools. The same for
                        every problem of a task set, unless its environments declare their tools (`CallsTools`)
    limit_calls(most)   sets `rollout.max_calls`, before the first reset
    """

    max_turns: int

    async def reset(self) -> str | Opening:
        """Returns the problem as the solver first reads it."""
        ...

    def parse(self, reply: str) -> str | None:
        """The action in a reply, or None if there is none (the turn is then lost and `hint()` is the observation)."""
        ...

    def hint(self) -> str:
        """The observation after a reply without an action."""
        ...

    async def step(self, action: str) -> StepResult: ...

    def outcome(self) -> float:
        """Reward of the attempt so far, in [0, 1]."""
        ...

    def success(self) -> bool: ...

    def summary(self) -> str:
        """The outcome in words, for the critic's prompt only."""
        ...


class CallsTools(Protocol):
    """An environment that declares tools and runs the calls: no `parse` and no `hint`, because the format of the task
    set (`agent.format`) reads replies. `tasks.declared_tools` makes an `Environment` of it."""

    max_turns: int
    tools: Sequence[ToolSpec]
    """What the model may call in this episode, known when the environment is made."""

    async def reset(self) -> str | Opening: ...

    async def step(self, action: tuple[ToolCall, ...] | str) -> StepResult:
        """The answers to the calls of a reply, one `str` for each. Arguments fit the schemas: other calls are answered
        before. A `str` is a reply without calls, or what its <answer> tags hold; the observation is then a user
        message."""
        ...

    def outcome(self) -> float: ...

    def success(self) -> bool: ...

    def summary(self) -> str: ...


@runtime_checkable
class ReadsCalls(Environment, Protocol):
    """An environment whose actions are calls and answers in a format. A team of agents can play it too
    (`icrl distill`)."""

    form: ToolFormat
    opening: Opening
    """The problem, as the last `reset` returned it."""
    specs: Sequence[ToolSpec]
    """The tools of this episode."""
    stateful: tuple[str, ...]
    """Tools whose answers to equal calls may differ within an attempt."""
    shares_answers: bool
    """Whether answers of one attempt are also true in the next one. False if calls change the environment itself."""

    def mistake(self, call: ToolCall) -> str:
        """Why a call cannot be made, in words for the model; empty if it can."""
        ...


class Teacher(Protocol):
    """A scripted player that writes the demonstrations of `icrl sft`. It is imperfect by design: it teaches the formats
    (attempt, critique, attempt after critique) and a prior, not the solution. One instance plays one episode."""

    def act(self, observation: str, critique: str | None) -> str:
        """The solver's next reply. `observation` is the newest one; `critique` is None in round 0."""
        ...

    def criticise(self, summary: str) -> str:
        """A critique of the failed attempt that just ended."""
        ...


@runtime_checkable
class TaskSet(Protocol):
    name: str

    def problems(self, split: Split) -> Sequence[Task]:
        """All problems of a split, in a fixed order; the two splits have no problem in common."""
        ...

    def environment(self, task: Task) -> Environment: ...


@contextmanager
def own_problem(task_set: TaskSet, task: Task) -> Iterator[None]:
    """Turns the errors of reading `task.problem` into a ConfigError."""
    try:
        yield
    except ConfigError:  # of a tool
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"problem {task.problem[:80]!r} is not one of {task_set.name!r}: take problems from TaskSet.problems()"
        ) from error


@runtime_checkable
class Teachable(TaskSet, Protocol):
    """A task set that can also warm-start a model."""

    def teacher(self, task: Task, rng: random.Random) -> Teacher: ...

    def vocabulary(self) -> Iterator[str]:
        """All words in its texts, for the embedded tokenizer."""
        ...


@runtime_checkable
class Checked(TaskSet, Protocol):
    """A task set with its own checks before a run, beyond reading its problems."""

    def check(self) -> None:
        """Raises ConfigError naming the error, its location and the remedy. Called once, before the run starts."""
        ...


@runtime_checkable
class Cacheable(TaskSet, Protocol):
    """A task set with tools, whose `Toolbox` gets the run's cache of answers."""

    tool_cache: ToolCache | None
    """Set before the first environment is made."""


@runtime_checkable
class AsksOwnModels(TaskSet, Protocol):
    """A task set that may ask the run's own engines, as judges."""

    own_models: Mapping[str, Asker]
    """By name: "solver", and "frozen" if there is a frozen critic. Set before the first episode is played; empty where
    there are no engines."""


@runtime_checkable
class Readable(TaskSet, Protocol):
    """A task set whose problems can be read without being played, so that problems that are too long for the context
    are found before the run."""

    def statement(self, task: Task) -> str | Opening | None:
        """What `Environment.reset` returns for the task; None if only a server or a process knows."""
        ...


def sendable(text: str) -> str:
    """Replaces lone surrogates by question marks. Tokenizers and servers' JSON parsers reject them, so a reply or an
    observation that has them would fail like the infrastructure."""
    return text.encode(errors="replace").decode()


def shown(value: object, chars: int = 200) -> str:
    """A value for a message: short, printable, and safe if its __repr__ fails."""
    try:
        text = reprlib.repr(value) if type(value) in (list, tuple, dict, set, frozenset) else repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return escaped(text, chars)


def escaped(text: str, chars: int = 500) -> str:
    """At most `chars` characters of a text, on one line and without control characters."""
    cut = text if len(text) <= chars else f"{text[:chars]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in cut)


class BadAnswer(EnvironmentFailure):
    """The environment returned an invalid answer, such as another protocol or a reward that is not a number. Also
    counted separately."""
