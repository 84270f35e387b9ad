"""Rulebook: one answer word per attribute word, by a hidden rule that is the same for every problem.

    problem  "crimson square tiny woven"      (one value of each slot)
    reply    "oak elm oak fir"                (one answer word per slot; reward 1 if all are right, else 0)
    summary  "wrong zib fine gop fine"        (each wrong slot, its answer in a code that only the critic reads)

The problem does not contain the rule: a solver has to find it, or learn it from a critic that can read the code. With 4
slots of 8 values, one guess in 4096 is right, so exploration alone finds nothing; with 3 slots of 6 values it finds
enough.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from icrl_megatron.tasks.base import StepResult
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

VALUES = (
    ("crimson", "amber", "green", "teal", "blue", "violet", "ivory", "black"),
    ("square", "circle", "star", "cross", "arrow", "heart", "wave", "spiral"),
    ("tiny", "small", "medium", "large", "huge", "narrow", "wide", "tall"),
    ("plain", "dotted", "striped", "woven", "glossy", "rough", "torn", "folded"),
)
ANSWERS = ("oak", "elm", "fir", "ash", "yew", "bay", "alder", "cedar")
HINTS = ("zib", "gop", "wux", "nar", "kef", "tol", "pim", "dra")
"""HINTS[i] is the code of ANSWERS[i]."""
FINE = "fine"
CRITIC_ACCURACY = 0.4


@dataclass(frozen=True)
class Shape:
    """The parameters of a Rulebook."""

    slots: int
    values: int
    """Number of values per slot, and of answer words in use."""
    heldout: int
    """Number of held-out problems, of `values ** slots`."""
    rule_seed: int
    stubbornness: float
    """Share of the teacher's answers that follow its wrong belief."""
    hunch: float
    """Share of its answers that are right; the rest are uniform over the answer words."""


SHAPES = {
    "rulebook_hard": Shape(slots=4, values=8, heldout=256, rule_seed=20, stubbornness=0.6, hunch=0.0),
    "rulebook_easy": Shape(slots=3, values=6, heldout=40, rule_seed=21, stubbornness=0.3, hunch=0.25),
}


def hidden_rule(shape: Shape) -> tuple[dict[str, str], ...]:
    """For each slot: value -> answer word, a permutation fixed by the shape's seed."""
    rng = random.Random(shape.rule_seed)
    answers = ANSWERS[: shape.values]
    return tuple(
        dict(zip(values[: shape.values], rng.sample(answers, shape.values), strict=True))
        for values in VALUES[: shape.slots]
    )


class RulebookEnvironment:
    """One problem: a single turn, reward 1 if every slot is right and 0 otherwise."""

    max_turns = 1

    def __init__(self, shape: Shape, rule: tuple[dict[str, str], ...], problem: str) -> None:
        self._shape = shape
        self._problem = problem
        values = problem.split()
        if len(values) != shape.slots or any(v not in table for v, table in zip(values, rule, strict=True)):
            raise ConfigError(
                f"problem {problem!r} is not one of this Rulebook: it needs {shape.slots} attribute words, one of each "
                f"slot's first {shape.values}; take problems from TaskSet.problems()"
            )
        self._truth = tuple(table[v] for v, table in zip(values, rule, strict=True))
        self._answer: tuple[str, ...] | None = None

    async def reset(self) -> str:
        self._answer = None
        return self._problem

    def parse(self, reply: str) -> str | None:
        words = reply.split()
        if len(words) != self._shape.slots or not set(words) <= set(ANSWERS[: self._shape.values]):
            return None
        return " ".join(words)

    def hint(self) -> str:
        return "invalid"

    async def step(self, action: str) -> StepResult:
        answer = self.parse(action)
        if answer is None:
            return StepResult(self.hint(), done=True)
        self._answer = tuple(answer.split())
        return StepResult("", done=True)

    def outcome(self) -> float:
        return 1.0 if self.success() else 0.0

    def success(self) -> bool:
        return self._answer == self._truth

    def summary(self) -> str:
        if self.success():
            return "right"
        given = self._answer or (None,) * self._shape.slots
        codes = (FINE if g == t else HINTS[ANSWERS.index(t)] for g, t in zip(given, self._truth, strict=True))
        return " ".join(("wrong", *codes))


class RulebookTeacher:
    """Answers from a wrong belief, copies advice word for word, and reads the code correctly 40 % of the time."""

    def __init__(self, shape: Shape, rule: tuple[dict[str, str], ...], task: Task, rng: random.Random) -> None:
        self._shape = shape
        self._rng = rng
        self._answers = ANSWERS[: shape.values]
        self._truth = tuple(table[v] for v, table in zip(task.problem.split(), rule, strict=True))
        self._last: tuple[str, ...] = ()

    def act(self, observation: str, critique: str | None) -> str:
        advised = tuple((critique or "").split())
        if len(advised) != self._shape.slots or not set(advised) <= set(self._answers):
            advised = tuple(self._guess(truth) for truth in self._truth)
        self._last = advised
        return " ".join(advised)

    def _guess(self, truth: str) -> str:
        # The belief is as regular as the rule and wrong everywhere: the rule's answer shifted by one word.
        belief = self._answers[(self._answers.index(truth) + 1) % self._shape.values]
        stubborn, hunch = self._shape.stubbornness, self._shape.hunch
        weights = [
            stubborn * (a == belief) + hunch * (a == truth) + (1 - stubborn - hunch) / self._shape.values
            for a in self._answers
        ]
        return self._rng.choices(self._answers, weights)[0]

    def criticise(self, summary: str) -> str:
        """The full answer: fine slots as given, wrong slots decoded, with one error in 60 % of the critiques."""
        codes = summary.split()[1:]
        advice = [given if c == FINE else ANSWERS[HINTS.index(c)] for c, given in zip(codes, self._last, strict=True)]
        if self._rng.random() >= CRITIC_ACCURACY:
            slot = self._rng.choice([i for i, c in enumerate(codes) if c != FINE])
            advice[slot] = self._rng.choice([a for a in self._answers if a != advice[slot]])
        return f"<critic> {' '.join(advice)} </critic>"


class Rulebook:
    """A `Teachable` task set; `name` is one of `SHAPES`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shape = SHAPES[name]
        self.rule = hidden_rule(self.shape)

    def problems(self, split: Split) -> Sequence[Task]:
        shape = self.shape
        combinations = [" ".join(c) for c in itertools.product(*(v[: shape.values] for v in VALUES[: shape.slots]))]
        random.Random(shape.rule_seed).shuffle(combinations)
        chosen = combinations[: shape.heldout] if split == "heldout" else combinations[shape.heldout :]
        return [Task(f"{self.name}/{split}/{i}", self.name, split, c) for i, c in enumerate(chosen)]

    def environment(self, task: Task) -> RulebookEnvironment:
        return RulebookEnvironment(self.shape, self.rule, task.problem)

    def statement(self, task: Task) -> str:
        return task.problem

    def teacher(self, task: Task, rng: random.Random) -> RulebookTeacher:
        return RulebookTeacher(self.shape, self.rule, task, rng)

    def vocabulary(self) -> Iterator[str]:
        for values in VALUES[: self.shape.slots]:
            yield from values[: self.shape.values]
        yield from ANSWERS[: self.shape.values]
        yield from HINTS[: self.shape.values]
        yield from ("<critic>", "</critic>", "wrong", "right", FINE, "invalid")
