"""A run of a multi-agent system at one task, as typed events: who said what, and which events its author had read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.distill.timing import Timing
from icrl_megatron.distill.trajectory import SegmentKind, Tokens


@dataclass(frozen=True)
class Event:
    """Events are numbered by their place in `Run.events`, in the order of time.

    Example: Event("searcher", "search", "call", "", (0,), thread=1, call=ToolCall("search", {"query": "p 4 8 3"}))
    """

    agent: str
    """Who wrote it; for an observation, whose call it answers."""
    tag: str
    """The segment's agent: `plan`, `think`, `reflection`, `suggested_answer`, `double_check` or `answer`; of a call and
    an observation the tool."""
    kind: SegmentKind
    text: str
    """Empty for a call."""
    knows: tuple[int, ...]
    """Numbers of the earlier events that the author had read: an observation's is its call. What those events were
    based on is not included."""
    thread: int
    """One job of one agent, such as one line of a plan. Threads are numbered in the order in which they were given,
    which does not depend on which of them was faster."""
    call: ToolCall | None = None

    def __post_init__(self) -> None:
        texts = (self.agent, self.tag, self.text)
        if not all(isinstance(one, str) for one in texts) or self.kind not in get_args(SegmentKind):
            raise ValueError(f"an event of {self.agent!r} with the tag {self.tag!r} and the kind {self.kind!r}")


@dataclass(frozen=True)
class Run:
    """One finished attempt of a system at one task."""

    task_id: str
    attempt: int
    problem: str
    events: tuple[Event, ...]
    correct: bool
    spent: Mapping[str, Tokens]
    """By agent."""
    tools: tuple[ToolSpec, ...] = ()
    stateful: tuple[str, ...] = ()
    """Tools whose answer to equal calls may differ within an attempt."""
    uncounted: int = 0
    """Replies whose tokens the endpoint did not count; `spent` lacks them."""
    unreadable: int = 0
    """Replies that could not be read, after which the agent was asked again. They are no events."""
    system: str = ""
    """The system message of the problem; empty: none."""
    timing: Timing | None = field(default=None, compare=False)
    """None: unknown, in runs of earlier versions."""

    def total(self) -> Tokens:
        """Tokens of all agents."""
        return Tokens(sum(t.read for t in self.spent.values()), sum(t.written for t in self.spent.values()))

    @staticmethod
    def of_json(fields: Mapping[str, Any]) -> Run:
        """Inverse of `asdict`, after a round trip through JSON. Raises LookupError, TypeError, ValueError or
        AttributeError."""
        known = {"task_id": str, "attempt": int, "problem": str, "correct": bool, "uncounted": int, "unreadable": int}
        fields = {"system": "", "timing": None, **fields}  # runs of earlier versions have none
        known["system"] = str
        if wrong := [name for name, kind in known.items() if type(fields[name]) is not kind]:
            raise ValueError(f"{wrong[0]} is {str(fields[wrong[0]])[:80]!r}")

        def event(given: Mapping[str, Any]) -> Event:
            call = ToolCall(**given["call"]) if given["call"] else None
            return Event(**{**given, "knows": tuple(given["knows"]), "call": call})

        events = tuple(map(event, fields["events"]))
        spent = {agent: Tokens(**tokens) for agent, tokens in fields["spent"].items()}
        tools = tuple(ToolSpec(**tool) for tool in fields["tools"])
        timing = None if fields["timing"] is None else Timing.of_json(fields["timing"])
        made = {"events": events, "spent": spent, "tools": tools, "stateful": tuple(fields["stateful"])}
        return Run(**{**fields, **made, "timing": timing})


@dataclass(frozen=True)
class Failed:
    """An attempt that the infrastructure or an agent's form failed. It is counted and never becomes data."""

    task_id: str
    attempt: int
    kind: str
    """endpoint | environment | time | unreadable | too_long."""
    message: str = field(compare=False)
    unanswered: Run | None = field(default=None, compare=False)
    """The attempt up to a reply that could not be read: a wrong answer where the system itself is measured."""
