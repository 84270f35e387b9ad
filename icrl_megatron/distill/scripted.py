"""Scripted teams: agents without a model, for tests and for the embedded tasks. One function and one line per task set.

Archive's agents are often wrong, like its scripted teacher: the searcher trusts outdated notes, the coder
miscalculates, and the reflector and the verifier look closely only now and then. Each knows only its brief.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from icrl_megatron.agents.formats import Qwen3, ToolCalls
from icrl_megatron.agents.tools import ToolCall
from icrl_megatron.distill import roles
from icrl_megatron.distill.roles import AgentReply, Brief, Member, Note
from icrl_megatron.distill.system import REPORT
from icrl_megatron.tasks.archive import DOUBLE_CHECKS, MISCALCULATES, TRUSTS_SEARCH, asked, joined, spelled
from icrl_megatron.utils.errors import ConfigError

_OLD, _DOUBT, _COMPUTE = "old note", "doubt", "compute"
SEARCHER, CODER = "searcher", "coder"
_PROMPTS = {
    roles.PLANNER: "write a plan : a person is a job for the searcher , a sum is one for the coder",
    SEARCHER: "find the home of a person and then its size , with search or page",
    CODER: "add the sizes that were found",
    roles.REFLECTOR: "say whether a size is doubtful",
    roles.ANSWERER: "give the number that was found",
    roles.VERIFIER: "check the answer and give a score from 1 to 4",
}


@dataclass(frozen=True)
class _Scripted:
    """An agent that a function plays. Its tokens are words: those of its prompt and brief, and those it writes."""

    prompt: str
    script: Callable[[Brief, random.Random], str]

    async def reply(self, brief: Brief) -> AgentReply:
        text = self.script(brief, random.Random(brief.seed))
        specs = [f"{s.name} {s.description} {json.dumps(dict(s.parameters))}" for s in brief.tools]
        notes = [note.text for note in (*brief.notes, *brief.own)]
        read = " ".join([self.prompt, brief.question, brief.job, *specs, *notes, *brief.team.values(), brief.problem])
        return AgentReply(text, len(read.split()), len(text.split()))


@dataclass(frozen=True)
class _Size:
    town: str
    number: int
    old: bool


def _reports(notes: Sequence[Note]) -> list[str]:
    return [joined(note.text) for note in notes if note.tag == REPORT]


def _sizes(notes: Sequence[Note]) -> list[_Size]:
    """The size of each report that has one, oldest first."""
    found = (re.search(r"(t\d{3})( old note)? size (\d+)", text) for text in _reports(notes))
    return [_Size(m[1], int(m[3]), bool(m[2])) for m in found if m]


def _believed(brief: Brief) -> list[_Size]:
    """For each person of the question, what the newest report about the town says."""
    sizes = _sizes(brief.notes)
    newest = {size.town: size for size in sizes}
    return [newest[size.town] for size in sizes[: len(asked(brief.question))]]


def _number(brief: Brief) -> int | None:
    """The newest sum; for one person the size."""
    sums = [int(text) for text in _reports(brief.notes) if re.fullmatch(r"\d+", text)]
    believed = _believed(brief)
    return sums[-1] if sums else believed[-1].number if believed else None


def _call(brief: Brief, name: str, argument: str) -> str:
    (key,) = next(spec.parameters["properties"] for spec in brief.tools if spec.name == name)
    return Qwen3(brief.tools).render(ToolCalls((ToolCall(name, {key: argument}),)))


def _planner(brief: Brief, rng: random.Random) -> str:
    people = asked(brief.question)
    doubts = [n.text for n in brief.notes if n.tag in (roles.REFLECTION, roles.CHECK)]
    then = f"\nthen\n{CODER}: sum" if len(people) > 1 else ""
    if doubts and _DOUBT in doubts[-1]:
        old = dict.fromkeys(size.town for size in _believed(brief) if size.old)
        jobs = "\n".join(f"{SEARCHER}: page {spelled(town)}" for town in old)
    elif doubts:
        return f"<plan> {CODER}: sum </plan>"
    else:
        jobs = "\n".join(f"{SEARCHER}: {spelled(f'p{person:03d}')}" for person in people)
    return f"<plan> {jobs}{then} </plan>"


def _searcher(brief: Brief, rng: random.Random) -> str:
    observed = [note.text for note in brief.own if note.tag == "observation"]
    job = joined(brief.job)
    if not observed:
        page = job.startswith("page ")
        return _call(brief, "page" if page else "search", spelled(job.removeprefix("page ")))
    town = re.search(r"lives in (t\d{3})", joined(observed[-1]))
    if town is None:
        return observed[-1]
    return _call(brief, "search" if rng.random() < TRUSTS_SEARCH else "page", spelled(town[1]))


def _coder(brief: Brief, rng: random.Random) -> str:
    observed = [joined(note.text) for note in brief.own if note.tag == "observation"]
    if not observed:
        numbers = [str(size.number) for size in _believed(brief)]
        again = any(re.fullmatch(r"\d+", text) for text in _reports(brief.notes))
        return _call(brief, "calculator", spelled(" + ".join(reversed(numbers) if again else numbers)))
    wrong = observed[-1].isdecimal() and rng.random() < MISCALCULATES
    return spelled(str(int(observed[-1]) + rng.choice((-1, 1, 10)))) if wrong else spelled(observed[-1])


def _reflector(brief: Brief, rng: random.Random) -> str:
    doubtful = any(size.old for size in _believed(brief)) and rng.random() < DOUBLE_CHECKS
    return f"<reflection> {_OLD} {_DOUBT} </reflection>" if doubtful else "enough"


def _answerer(brief: Brief, rng: random.Random) -> str:
    number = _number(brief)
    return f"<answer> {'no number' if number is None else spelled(str(number))} </answer>"


def _verifier(brief: Brief, rng: random.Random) -> str:
    if rng.random() >= DOUBLE_CHECKS:
        return "pass"
    believed = _believed(brief)
    if any(size.old for size in believed):
        said = f"1 {_DOUBT}"
    else:
        said = "4" if _number(brief) == sum(size.number for size in believed) else f"2 {_COMPUTE}"
    return f"<double_check> {said} </double_check>"


def _archive() -> dict[str, Member]:
    def member(name: str, script: Callable[[Brief, random.Random], str], *tools: str) -> Member:
        return Member(_Scripted(_PROMPTS[name], script), tools, _PROMPTS[name] if tools else "")

    return {
        roles.PLANNER: member(roles.PLANNER, _planner),
        SEARCHER: member(SEARCHER, _searcher, "search", "page"),
        CODER: member(CODER, _coder, "calculator"),
        roles.REFLECTOR: member(roles.REFLECTOR, _reflector),
        roles.ANSWERER: member(roles.ANSWERER, _answerer),
        roles.VERIFIER: member(roles.VERIFIER, _verifier),
    }


TEAMS: dict[str, Callable[[], Mapping[str, Member]]] = {"archive": _archive, "archive_easy": _archive}


def team(source: str) -> Mapping[str, Member]:
    """The scripted team of a task set. Raises ConfigError if it has none."""
    if source not in TEAMS:
        raise ConfigError(
            f"distill.system=scripted: task set {source!r} has no scripted team ({', '.join(TEAMS)} have one); set "
            "distill.system=endpoint"
        )
    return TEAMS[source]()
