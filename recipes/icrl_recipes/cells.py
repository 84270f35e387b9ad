"""The cells of the tables of ICRL's paper (arXiv 2605.15224): which runs a number is measured on, with which
evaluation, and what the paper reports. Made from the recipes of `qwen3.py`.

A run is trained once, whatever number of cells it serves, and an evaluation likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from icrl_megatron.settings.arms import ARMS
from icrl_megatron.tasks.published import MATH_TESTS
from icrl_recipes.qwen3 import (
    ABLATIONS,
    CODE_RUNS,
    FURTHER_BASELINES,
    METHODS,
    PAPER_RUNS,
    PUBLISHED_ABLATIONS,
    RUNS_8B,
    TITLES,
    ablation_name,
    name_of,
    size_name,
)

PUBLISHED_IN = "arXiv 2605.15224 (docs/FACTS.md)"
AGENTIC = ("alfworld", "webshop", "searchqa")
SUBSETS = ("hotpotqa", "2wikimultihopqa", "bamboogle", "musique")
"""The subsets of SearchQA that ICRL names."""
FEW = ("aime24", "amc23")
"""Sets with so few problems that one sample of each says little."""
SAMPLES = 32
"""Samples of each problem of such a set. We do not know the paper's number."""
ROUNDS = 3
"""The paper reports success after up to three rounds at test time."""
SWAPPED_ON = ("alfworld", "webshop")
"""Tasks of the critic swap: those for which our sources state the tokens of a critique."""


class Critic(Enum):
    """Who writes the critiques of an evaluation."""

    ITSELF = "itself"
    START = "start"
    """The model that the run started from."""
    EXTERNAL = "external"
    """A model that the user serves."""


CRITICS = {
    Critic.ITSELF: "the trained model itself",
    Critic.START: "the model before training",
    Critic.EXTERNAL: "an external model of 20B to 32B",
}


@dataclass(frozen=True)
class Evaluation:
    """One `icrl eval` of a finished run."""

    rounds: int = 1
    samples: int = 1
    on: tuple[str, ...] = ()
    """Held-out subsets; empty: all."""
    critic: Critic = Critic.ITSELF

    @property
    def name(self) -> str:
        """The name of its folder."""
        parts = [f"rounds{self.rounds}", *self.on]
        parts += [f"samples{self.samples}"] if self.samples > 1 else []
        parts += [f"critic_{self.critic.value}"] if self.critic is not Critic.ITSELF else []
        return "_".join(parts)


class Figure(Enum):
    """A number of an evaluation."""

    SUCCESS = "success without a critique, %"
    SECOND = "success by the second round, %"
    THIRD = "success by the third round, %"
    RESCUED = "failed attempts whose revision succeeds, %"
    TOKENS = "tokens per critique"


@dataclass(frozen=True)
class Reading:
    """A number that one evaluation of one run has."""

    recipe: str
    evaluation: Evaluation
    figure: Figure
    subset: str = ""
    """A subset of the held-out problems, as `--on` names it; empty: all of them."""


@dataclass(frozen=True)
class Cell:
    """One number of a table. Ours is the mean of its readings."""

    name: str
    table: str
    task: str
    size: str
    method: str
    figure: Figure
    readings: tuple[Reading, ...]
    published: float | None = None
    """The paper's number; None if our sources do not state it."""
    note: str = ""

    @property
    def recipes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(reading.recipe for reading in self.readings))


@dataclass(frozen=True)
class _Row:
    """The runs of one method with one model."""

    method: str
    """Its arm."""
    size: str
    recipes: Mapping[str, str]
    """Task -> recipe."""
    rounds: int = 1
    """Rounds of its evaluations. A first attempt does not depend on it."""

    def name(self, table: str, what: str) -> str:
        return f"{table}-{self.method}-{size_name(self.size)}-{what}"

    def success(self, task: str, subset: str = "") -> Reading:
        return self.read(task, Figure.SUCCESS, subset)

    def read(self, task: str, figure: Figure, subset: str = "", critic: Critic = Critic.ITSELF) -> Reading:
        return Reading(self.recipes[task], self._evaluation(task, subset, critic), figure, subset)

    def _evaluation(self, task: str, subset: str, critic: Critic) -> Evaluation:
        if task != "math":
            return Evaluation(self.rounds, critic=critic)
        few = subset in FEW
        on = FEW if few else tuple(name for name in MATH_TESTS if name not in FEW)
        return Evaluation(self.rounds, SAMPLES if few else 1, on, critic)

    def everything(self) -> tuple[Reading, ...]:
        """Success on each of the three agentic tasks and five sets of mathematics."""
        return (*map(self.success, AGENTIC), *(self.success("math", name) for name in MATH_TESTS))


def _rows() -> list[_Row]:
    """The methods of the result tables, with each model."""
    made = []
    for method in METHODS:
        for size in dict.fromkeys(run[0] for run in (*PAPER_RUNS, *CODE_RUNS)):
            runs = [run for run in (*PAPER_RUNS, *CODE_RUNS) if run[0] == size]
            recipes = {run[1]: name_of(method.name, run) for run in runs}
            made.append(_Row(method.arm, size, recipes, ROUNDS if method.arm == "icrl" else 1))
    for arm, tasks in FURTHER_BASELINES.items():
        made.append(_Row(arm, "8B", {task: name_of(arm, ("8B", task, RUNS_8B[task])) for task in tasks}))
    return made


def _ablations() -> list[_Row]:
    made = []
    for name, arm in ABLATIONS.items():
        tasks = RUNS_8B if name in PUBLISHED_ABLATIONS else ("alfworld",)
        made.append(_Row(arm, "8B", {task: ablation_name(name, task) for task in tasks}))
    return made


AVERAGES = {method.arm: method.averages for method in METHODS}
FIGURES: dict[str, float] = {
    "math-icrl-8b-average": 75.3,
    "math-grpo-8b-average": 68.3,
    "math-critique_grpo-8b-average": 73.3,
    "math-icrl-8b-aime24": 65.1,
    "math-grpo-8b-aime24": 50.0,
    "ablation-icrl-8b-all": 69.8,
    "ablation-no_role_groups-8b-all": 68.4,
    "ablation-no_calibration-8b-all": 67.8,
    "rounds-icrl-8b-alfworld-third": 98.0,
    "critic-itself-8b-alfworld-tokens": 57.0,
    "critic-itself-8b-webshop-tokens": 94.0,
}
"""Cell -> the paper's number, beside the agentic averages of `METHODS`."""
_WEIGHTS = "ours weighs three agentic tasks and five sets of mathematics equally; we do not know the paper's weights"
_TABLES_4B = "the paper's tables name Qwen3-4B, the authors' code this model; the average is given at Qwen3-4B only"
NOTES = {
    "rounds-icrl-8b-alfworld-third": "the size of the model behind this number is not stated in our sources",
    **{f"ablation-{arm}-8b-all": _WEIGHTS for arm in ("icrl", *(ABLATIONS[name] for name in PUBLISHED_ABLATIONS))},
}


def _cell(row: _Row, table: str, what: str, readings: tuple[Reading, ...], task: str, name: str = "") -> Cell:
    name = name or row.name(table, what)
    published = FIGURES.get(name)
    note = NOTES.get(name, "")
    if (table, what) == ("agentic", "average"):
        published = AVERAGES.get(row.method, {}).get(row.size)
        note = _TABLES_4B if published is None and row.size != "8B" else note
    return Cell(name, table, task, row.size, row.method, readings[0].figure, readings, published, note)


def _successes(row: _Row, table: str) -> Iterator[Cell]:
    """Success of a method on each task, each set of mathematics, and their averages."""
    agentic = "agentic" if table == "results" else table
    for task in (task for task in AGENTIC if task in row.recipes):
        yield _cell(row, agentic, task, (row.success(task),), TITLES[task])
        for subset in SUBSETS if task == "searchqa" else ():
            reading = (row.success(task, f"searchqa_test_{subset}"),)
            what = f"{task}-{subset.removesuffix('multihopqa')}"
            yield _cell(row, agentic, what, reading, f"{TITLES[task]}, {subset}")
    if set(AGENTIC) <= row.recipes.keys():
        yield _cell(row, agentic, "average", tuple(map(row.success, AGENTIC)), "mean of the three agentic tasks")
    if "math" in row.recipes:
        of_sets = tuple(row.success("math", name) for name in MATH_TESTS)
        of_table = "math" if table == "results" else table
        for name, of_set in zip(MATH_TESTS, of_sets, strict=True):
            yield _cell(row, of_table, name, (of_set,), name)
        yield _cell(row, of_table, "average" if table == "results" else "math", of_sets, "mean of the five sets")


def _rounds(row: _Row) -> Iterator[Cell]:
    """What critiques add at test time."""
    figures = {"second": Figure.SECOND, "third": Figure.THIRD, "rescued": Figure.RESCUED}
    for task in row.recipes:
        for what, figure in figures.items():
            if task != "math":
                yield _cell(row, "rounds", f"{task}-{what}", (row.read(task, figure),), TITLES[task])
                continue
            of_sets = tuple(row.read(task, figure, name) for name in MATH_TESTS)
            yield _cell(row, "rounds", f"{task}-{what}", of_sets, "mean of the five sets")


def _critics(row: _Row) -> Iterator[Cell]:
    """The trained solver with other critics: success after the revision, and what a critique costs."""
    for critic in Critic:
        for task in SWAPPED_ON:
            for what, figure in {"success": Figure.SECOND, "tokens": Figure.TOKENS}.items():
                name = f"critic-{critic.value}-{size_name(row.size)}-{task}-{what}"
                reading = (row.read(task, figure, critic=critic),)
                yield _cell(row, "critic", what, reading, f"{TITLES[task]}, critic: {CRITICS[critic]}", name)


def _table() -> Iterator[Cell]:
    rows = _rows()
    for row in rows:
        yield from _successes(row, "results")
    trained = [row for row in rows if row.method == "icrl"]
    (large,) = (row for row in trained if row.size == "8B")
    ablations = _ablations()
    for row in ablations:
        yield from _successes(row, "ablation")
    for row in (large, *(row for row in ablations if set(RUNS_8B) <= row.recipes.keys())):
        yield _cell(row, "ablation", "all", row.everything(), "mean of all tasks")
    for row in trained:
        yield from _rounds(row)
    yield from _critics(large)


CELLS: dict[str, Cell] = {cell.name: cell for cell in _table()}
"""Name -> cell, in the order of the tables."""


def about(cell: Cell) -> str:
    """The method of a cell, in a sentence."""
    return ARMS[cell.method].about
