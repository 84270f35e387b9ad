"""What a task set is: where problems come from, how one is played, how an answer is judged.

A new task is one file with one class that satisfies `TaskSet`, and one line in `registry.py`.
"""

from __future__ import annotations

import random
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from icrl_megatron.types import Split, Task


@dataclass(frozen=True)
class StepResult:
    """The environment's answer to one action."""

    observation: str
    done: bool


class Environment(Protocol):
    """One playable problem. An instance belongs to one attempt at a time; `reset` starts the same problem afresh.

    `reset` and `step` are coroutines because environments may live behind a network; the embedded ones never wait.
    Failures of infrastructure raise `EnvironmentFailure`; they cost the episode, never a reward of 0. So does whatever
    else a method raises, a return of another type, and a call that takes too long (`rollout/checked_environment.py`).
    """

    max_turns: int

    async def reset(self) -> str:
        """Returns the problem as the solver first reads it."""
        ...

    def parse(self, reply: str) -> str | None:
        """The action inside a reply, or None if there is none (a turn is then lost and `hint()` is observed)."""
        ...

    def hint(self) -> str:
        """What is observed after a reply without an action."""
        ...

    async def step(self, action: str) -> StepResult: ...

    def outcome(self) -> float:
        """Reward of the attempt so far, in [0, 1]."""
        ...

    def success(self) -> bool: ...

    def summary(self) -> str:
        """The outcome in words, for the critic's prompt only."""
        ...


class Teacher(Protocol):
    """A scripted player that writes the demonstrations of `icrl sft`, imperfect by design: it teaches the forms
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
        """All problems of a split, in a fixed order; the two splits share none."""
        ...

    def environment(self, task: Task) -> Environment: ...


@runtime_checkable
class Teachable(TaskSet, Protocol):
    """A task set that can also warm-start a model."""

    def teacher(self, task: Task, rng: random.Random) -> Teacher: ...

    def vocabulary(self) -> Iterator[str]:
        """Every word its texts use, for the embedded tokenizer."""
        ...


@runtime_checkable
class Checked(TaskSet, Protocol):
    """A task set with more to examine before a run than that its problems can be read."""

    def check(self) -> None:
        """Raises ConfigError naming what is wrong, where, and the remedy. Called once, before the run starts."""
        ...


@runtime_checkable
class Readable(TaskSet, Protocol):
    """A task set whose problems can be read without being played, so that one that is too long for the context is found
    before the run."""

    def statement(self, task: Task) -> str | None:
        """What `Environment.reset` returns for the task; None where only a server or a process can tell."""
        ...


def sendable(text: str) -> str:
    """With half characters (lone surrogates) as question marks: no tokenizer takes them, and no JSON of a server's, so
    that a reply or an observation could fail the infrastructure."""
    return text.encode(errors="replace").decode()


def shown(value: object, chars: int = 200) -> str:
    """A value as a message can hold it: short, printable, and whatever its __repr__ does."""
    try:
        text = reprlib.repr(value) if type(value) in (list, tuple, dict, set, frozenset) else repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return escaped(text, chars)


def escaped(text: str, chars: int = 500) -> str:
    """At most so many characters of a text, on one line and without control characters."""
    cut = text if len(text) <= chars else f"{text[:chars]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in cut)


class EnvironmentFailure(RuntimeError):
    """The infrastructure behind an environment failed (not the model): the episode is dropped and counted."""


class BadAnswer(EnvironmentFailure):
    """The environment returned an invalid answer, such as another protocol or a reward that is not a number. Counted
    separately too."""
