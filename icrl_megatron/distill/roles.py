"""The agents of a system: what each one reads, and how its reply is written and read.

Scripted and endpoint agents write the same forms, so one reader serves both. Every reply may begin with
<think>...</think>; what follows it is:

    planner    <plan> lines "AGENT: job", with a line "then" between jobs that must wait for the ones before it </plan>
    an agent   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or text: its report, which ends the job
    reflector  <reflection>what is missing or doubtful</reflection> to plan again, or: enough
    answerer   <answer>...</answer>
    verifier   <double_check>1 to 4, and why</double_check>; below 3, the system plans again. Or: pass
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from icrl_megatron.agents.formats import last_tagged
from icrl_megatron.agents.tools import ToolSpec

PLANNER, REFLECTOR, VERIFIER, ANSWERER = "planner", "reflector", "verifier", "answerer"
ROLES = (PLANNER, REFLECTOR, VERIFIER, ANSWERER)
THINK, PLAN, REFLECTION, SUGGESTION, CHECK, ANSWER = (
    "think", "plan", "reflection", "suggested_answer", "double_check", "answer",
)  # fmt: skip
"""Tags of the agents' texts in a trajectory, as in Chain-of-Agents."""
GOOD_SCORE = 3
"""The lowest score of a check that accepts an answer."""
MOST_JOBS = 32
"""In one plan."""
_THEN = "then"


class Unreadable(ValueError):
    """A reply is not of its role's form. The agent reads the message and is asked again."""


@dataclass(frozen=True)
class Note:
    """A message that an agent reads."""

    event: int
    agent: str
    tag: str
    """As in `Event`; `report` for what an agent found out."""
    text: str


@dataclass(frozen=True)
class Brief:
    """All that an agent knows when it replies."""

    agent: str
    question: str
    seed: int
    """Seed of this reply: a function of the run's seed, the task, the attempt and the place in it."""
    job: str = ""
    """For an agent with tools: its line of the plan."""
    notes: tuple[Note, ...] = ()
    """Messages of others, oldest first."""
    own: tuple[Note, ...] = ()
    """For an agent with tools: the calls and observations of this job, oldest first."""
    tools: tuple[ToolSpec, ...] = ()
    may_call: bool = True
    """False: no calls are left."""
    team: Mapping[str, str] = field(default_factory=dict)
    """For the planner: agents with tools and what they are for."""
    problem: str = ""
    """Why the previous reply to this brief could not be read; empty for the first try."""


@dataclass(frozen=True)
class AgentReply:
    text: str
    read: int | None
    """Tokens of the prompt; None if the endpoint did not count them."""
    written: int | None


class Agent(Protocol):
    """One agent. It keeps no state: all that it knows is in the brief."""

    async def reply(self, brief: Brief) -> AgentReply:
        """Raises EndpointError if the infrastructure failed."""
        ...


@dataclass(frozen=True)
class Member:
    """An agent of a team."""

    agent: Agent
    tools: tuple[str, ...] = ()
    """Tools that it may call, if it gets jobs; of those, an episode may have fewer. Empty: all of the episode."""
    about: str = ""
    """What the planner is told about it."""


@dataclass(frozen=True)
class AgentJob:
    agent: str
    text: str


@dataclass(frozen=True)
class TeamPlan:
    text: str
    stages: tuple[tuple[AgentJob, ...], ...]
    """Jobs of a stage run at the same time, after those of the stages before."""


def thought(reply: str) -> tuple[str, str]:
    """(text of the thinking, rest of the reply). Raises Unreadable."""
    before, closed, rest = reply.rpartition("</think>")
    if not closed:
        if "<think>" in reply:
            raise Unreadable("<think> is not closed: end it with </think>")
        return "", reply.strip()
    return before.replace("<think>", "", 1).strip(), rest.strip()


def tagged(text: str, tag: str) -> str | None:
    """What the last complete <tag>...</tag> holds; None without one. Raises Unreadable if it is empty."""
    found = last_tagged(text, tag)
    if found is not None and not found[1].strip():
        raise Unreadable(f"<{tag}> is empty")
    return found[1].strip() if found else None


def required(text: str, tag: str) -> str:
    """As `tagged`. Raises Unreadable without the tag."""
    found = tagged(text, tag)
    if found is None:
        raise Unreadable(f"write <{tag}>...</{tag}>")
    return found


def read_plan(text: str, team: Collection[str]) -> TeamPlan:
    """Raises Unreadable."""
    plan, stages = required(text, PLAN), [list[AgentJob]()]
    for line in filter(None, map(str.strip, plan.splitlines())):
        if line.casefold() == _THEN:
            stages.append([])
            continue
        agent, colon, job = (part.strip() for part in line.partition(":"))
        if not colon or agent not in team or not job:
            raise Unreadable(f"a line of the plan is {line[:80]!r}: write AGENT: JOB, with one of {', '.join(team)}")
        stages[-1].append(AgentJob(agent, job))
    if not 1 <= sum(map(len, stages)) <= MOST_JOBS:
        raise Unreadable(f"the plan has {sum(map(len, stages))} jobs: give 1 to {MOST_JOBS}")
    return TeamPlan(plan, tuple(tuple(stage) for stage in stages if stage))


def read_reflection(text: str) -> str:
    """Empty: what was found is enough. Raises Unreadable."""
    return _or_word(text, REFLECTION, "enough")


def read_check(text: str) -> str:
    """Empty: not checked. Raises Unreadable."""
    found = _or_word(text, CHECK, "pass")
    if found and score_of(found) is None:
        raise Unreadable(f"<{CHECK}> must begin with a score from 1 to 4")
    return found


def score_of(check: str) -> int | None:
    """The score at the beginning of a check; None without one."""
    found = re.match(r"\s*(?:score\s*[:=]?\s*)?([1-4])(?!\.?\d)", check, re.IGNORECASE)
    return int(found[1]) if found else None


def _or_word(text: str, tag: str, word: str) -> str:
    found = tagged(text, tag)
    if found is None and text.strip().strip(".").casefold() != word:
        raise Unreadable(f"write <{tag}>...</{tag}>, or only: {word}")
    return found or ""
