"""Archive: questions about fictional people and towns that only tools can answer, several calls each.

    problem  "sum size home p 4 8 3 p 1 9 0 ?"     (two people; "size home p 4 8 3 ?" in the easy set)
    reply    "<plan> home home size size sum </plan> <search> p 4 8 3 </search>"
    observed "p 4 8 3 lives in t 0 2 7"
    reply    "<page> t 0 2 7 </page>", then "<calculator> 1 8 + 2 4 </calculator>", then "<answer> 4 2 </answer>"

A search for a town often returns an outdated size; the town's page has the right one. Held-out problems are about other
people, who live in other towns, so no fact that a model learned in training answers them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.agents.calculator import Calculator
from icrl_megatron.agents.formats import Tags
from icrl_megatron.agents.judge import by_rule
from icrl_megatron.agents.search import Search
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.agents.tools import Arguments, Tool, ToolSpec, ToolUseError
from icrl_megatron.settings.task_options import ArchiveSource
from icrl_megatron.settings.task_sections import Answers
from icrl_megatron.tasks.tool_use import ToolEnvironment
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

PEOPLE, TOWNS, LARGEST = 1000, 900, 49
HELDOUT = 0.2
"""Share of the people, and of the towns, that no training problem needs. Drawn at random, so that every digit is
trained at every place of a name. Many names, because a model that has seen 80 towns copies names like 2 2 badly."""
OUTDATED = 0.7
"""Share of the towns whose size a search gets wrong."""
MAX_TURNS = 6
"""For each person of a question."""
TRAIN_PROBLEMS, HELDOUT_PROBLEMS = 4000, 256
TRUSTS_SEARCH, MISCALCULATES, DOUBLE_CHECKS = 0.6, 1 / 7, 0.25
"""Probabilities of the teacher: searching for a town's size first, giving a wrong sum, opening the page after all."""
VERSION = "archive 1"
"""Of the facts, for the cache of answers."""
RIGHT, SILENT, OUTDATED_SIZE, WRONG_SUM = "right", "silent", "outdated", "sum"


@dataclass(frozen=True)
class World:
    """The facts, fixed by a seed."""

    home: tuple[int, ...]
    """Town of each person."""
    size: tuple[int, ...]
    """Of each town."""
    noted: tuple[int, ...]
    """The size that a search says."""


@cache
def world() -> World:
    rng = random.Random(7)
    size = [rng.randint(1, LARGEST) for _ in range(TOWNS)]
    noted = [rng.choice([n for n in range(1, LARGEST + 1) if n != s]) if rng.random() < OUTDATED else s for s in size]
    home = dict[int, int]()
    for people, towns in zip(divided(PEOPLE), divided(TOWNS), strict=True):
        home |= {person: rng.choice(towns) for person in people}
    return World(tuple(home[person] for person in range(PEOPLE)), tuple(size), tuple(noted))


def divided(count: int) -> tuple[list[int], list[int]]:
    """The numbers below `count`: those for training, and the held-out ones."""
    shuffled = random.Random(count).sample(range(count), count)
    heldout = round(HELDOUT * count)
    return shuffled[heldout:], shuffled[:heldout]


def spelled(text: str) -> str:
    """Digit by digit, with spaces: "p483 lives in t27" -> "p 4 8 3 lives in t 0 2 7"."""
    return " ".join(re.findall(r"[a-z]{2,}|[a-z]|\d|[^\sa-z\d]", text))


def joined(text: str) -> str:
    """The inverse of `spelled` for names and numbers."""
    return re.sub(r"(?<=[pt\d]) (?=\d)", "", " ".join(text.split()))


class TownPage:
    """A town's own page, which is right."""

    spec = replace(ToolSpec.of_text("page", "Opens the page of a town.", "town"), version=VERSION)

    async def call(self, arguments: Arguments) -> str:
        name = joined(arguments["town"])
        if not re.fullmatch(r"t\d{3}", name) or int(name[1:]) >= TOWNS:
            raise ToolUseError("no page")
        return spelled(f"{name} size {world().size[int(name[1:])]}")


class WordCalculator(Calculator):
    """The calculator over spelled numbers."""

    async def call(self, arguments: Arguments) -> str:
        try:
            return spelled(await super().call({"expression": joined(str(arguments["expression"]))}))
        except ToolUseError as error:
            raise ToolUseError("no number") from error


@cache
def index() -> tuple[Any, tuple[str, ...]]:
    """BM25 over one document a person and one a town. A document's subject counts twice, as a title would."""
    import bm25s

    facts = world()
    documents = [f"p{i:03d} lives in t{town:03d}" for i, town in enumerate(facts.home)]
    documents += [f"t{i:03d} old note size {size}" for i, size in enumerate(facts.noted)]
    indexed = [f"{text[:4]} {text}" for text in documents]
    found = bm25s.BM25()
    found.index(bm25s.tokenize(indexed, stopwords=None, show_progress=False), show_progress=False)
    return found, tuple(documents)


async def find(query: str, count: int) -> list[str]:
    import bm25s

    ranked, documents = index()
    words = bm25s.tokenize([joined(query)], stopwords=None, show_progress=False)
    rows, scores = ranked.retrieve(words, k=count, show_progress=False)
    return [spelled(documents[i]) for i, score in zip(rows[0], scores[0], strict=True) if score > 0]


@cache
def toolbox(tool_cache: ToolCache | None = None) -> Toolbox:
    tools: list[Tool] = [Search(find, passages=1, version=VERSION), TownPage(), WordCalculator()]
    return Toolbox(tools, ToolLimits(call_s=10.0, tries=1), tool_cache)


def form() -> Tags:
    return Tags([tool.spec for tool in toolbox().tools.values()])


def asked(problem: str) -> tuple[int, ...]:
    """The people that a problem names. Raises ConfigError for anything that is no problem of this task set."""
    match = re.fullmatch(r"(?:sum size home (p\d{3}) (p\d{3})|size home (p\d{3})) \?", joined(problem))
    if match is None:
        raise ConfigError(f"problem {problem[:80]!r} is not one of Archive: take problems from TaskSet.problems()")
    return tuple(int(name[1:]) for name in match.groups() if name)


def truth(people: Sequence[int]) -> int:
    return sum(world().size[world().home[person]] for person in people)


class ArchiveEnvironment(ToolEnvironment):
    """One question. The summary tells the critic what went wrong, in one word."""

    def __init__(self, problem: str, agent: Answers, tool_cache: ToolCache | None = None) -> None:
        self._people = asked(problem)
        judge = by_rule(partial(same_number, truth=truth(self._people)))
        super().__init__(problem, form(), toolbox(tool_cache), judge, MAX_TURNS * len(self._people), agent)

    def hint(self) -> str:
        return "invalid"

    def summary(self) -> str:
        if self.success():
            return RIGHT
        if self.answer is None:
            return SILENT
        return OUTDATED_SIZE if self.session.counts["page", "answer"] < len(self._people) else WRONG_SUM


def same_number(answer: str, truth: int) -> bool:
    return joined(answer) == str(truth)


class ArchiveTeacher:
    """A scripted system of planner, searcher, coder and verifier. It is often wrong: it trusts outdated notes and
    miscalculates. Advice makes it open pages or compute again."""

    def __init__(self, task: Task, rng: random.Random, tools: bool = True) -> None:
        """Without `tools`, every reply is the right answer."""
        self._people, self._rng, self._tools = asked(task.problem), rng, tools
        self._script: Iterator[str] = iter(())

    def act(self, observation: str, critique: str | None) -> str:
        if not self._tools:
            return f"<answer> {spelled(str(truth(self._people)))} </answer>"
        start = joined(observation)
        if start.endswith("?"):
            self._script = self._play(critique or "")
        return next(self._script)

    def _play(self, critique: str) -> Iterator[str]:
        facts, sizes, plan = world(), [], " ".join(["home", "size"] * len(self._people))
        careful = "page" in critique
        for number, person in enumerate(self._people):
            before = f"<plan> {plan} </plan> " if number == 0 else ""
            yield f"{before}<search> {spelled(f'p{person:03d}')} </search>"
            town = facts.home[person]
            name = spelled(f"t{town:03d}")
            if careful or self._rng.random() >= TRUSTS_SEARCH:
                yield f"<page> {name} </page>"
                sizes.append(facts.size[town])
                continue
            yield f"<search> {name} </search>"
            if self._rng.random() < DOUBLE_CHECKS:
                yield f"<check> doubt </check> <page> {name} </page>"
                sizes.append(facts.size[town])
            else:
                sizes.append(facts.noted[town])
        if len(sizes) > 1:
            yield f"<calculator> {spelled(' + '.join(map(str, sizes)))} </calculator>"
        result = sum(sizes)
        if len(sizes) > 1 and "compute" not in critique and self._rng.random() < MISCALCULATES:
            result += self._rng.choice((-1, 1, 10))
        yield f"<answer> {spelled(str(result))} </answer>"

    def criticise(self, summary: str) -> str:
        advice = {OUTDATED_SIZE: "page", WRONG_SUM: "compute page"}.get(summary, "page")
        return f"<critic> {advice if self._rng.random() < 0.7 else 'compute'} </critic>"


class Archive:
    """A `Teachable` task set; `archive` asks for two towns, `archive_easy` for one. The teacher of `archive_answers`
    answers without tools: a model that learns from it can only memorize."""

    def __init__(self, source: ArchiveSource) -> None:
        self.name, self._agent = source.name, source.agent
        self._people = 1 if source.name == "archive_easy" else 2
        self.tool_cache: ToolCache | None = None

    def problems(self, split: Split) -> Sequence[Task]:
        rng = random.Random(f"{'archive' if self._people == 2 else 'archive_easy'} {split}")
        people = divided(PEOPLE)[split == "heldout"]
        count = TRAIN_PROBLEMS if split == "train" else HELDOUT_PROBLEMS
        if self._people == 1:
            count = min(count, len(people))
        found: dict[str, None] = {}
        while len(found) < count:
            names = " ".join(f"p{person:03d}" for person in rng.sample(people, self._people))
            found[spelled(f"{'sum ' if self._people > 1 else ''}size home {names} ?")] = None
        return [Task(f"{self.name}/{split}/{i}", self.name, split, problem) for i, problem in enumerate(found)]

    def environment(self, task: Task) -> ArchiveEnvironment:
        return ArchiveEnvironment(task.problem, self._agent, self.tool_cache)

    def statement(self, task: Task) -> str:
        return task.problem

    def teacher(self, task: Task, rng: random.Random) -> ArchiveTeacher:
        return ArchiveTeacher(task, rng, tools=self.name != "archive_answers")

    def vocabulary(self) -> Iterator[str]:
        yield from ("(1)", *"0123456789pt?+-*/.=")
        for tag in ("plan", "check", "critic", "answer", Tags.observation, *toolbox().tools):
            yield from (f"<{tag}>", f"</{tag}>")
        yield from ("sum", "size", "home", "lives", "in", "old", "note", "doubt", "page", "compute", "no", "number")
        yield from (RIGHT, SILENT, OUTDATED_SIZE, "invalid", "Nothing", "was", "found.")
        for tag in ("think", "reflection", "suggested_answer", "double_check"):  # of distill/scripted.py
            yield from (f"<{tag}>", f"</{tag}>")
        yield from ("searcher:", "coder:", "then")
