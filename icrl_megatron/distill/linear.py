"""From a run of a multi-agent system to one sequence that a single model can write (Chain-of-Agents).

Agents work at the same time and see different things, but a sequence has one order, and its author sees
everything before. So an event may move, but never ahead of anything that its author had read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from icrl_megatron.distill import roles
from icrl_megatron.distill.events import Event, Run
from icrl_megatron.distill.trajectory import Segment, Trajectory


def linear(run: Run) -> Trajectory:
    """The trajectory of a run: its events ordered as `_ordered` says, without repeated messages (`_merged`)."""
    segments = [
        Segment(event.tag, event.text, event.kind, event.kind != "observation", event.call)
        for event in _merged(run, list(_ordered(_units(run))))
    ]
    unchecked = {  # suggestions that were the answer
        number
        for number, (first, second) in enumerate(pairwise(segments))
        if [first.agent, second.agent] == [roles.SUGGESTION, roles.ANSWER] and first.text == second.text
    }
    segments = [segment for number, segment in enumerate(segments) if number not in unchecked]
    spent, tools, system = run.total(), run.tools, run.system
    return Trajectory(run.task_id, run.problem, tuple(segments), run.correct, spent, tools=tools, system=system)


@dataclass(frozen=True)
class _Unit:
    """A text, or a call or answer with its observation: what stays together."""

    number: int
    """Number of its first event."""
    events: tuple[Event, ...]
    needs: frozenset[int]
    """Units before which it must not stand."""

    @property
    def thread(self) -> int:
        return self.events[0].thread


def _units(run: Run) -> list[_Unit]:
    """A call of a tool with a state needs all calls of that tool before it, of every agent: its answer depends on them.

    Raises ValueError unless every call has one observation, and every event knows only earlier ones."""
    events = run.events
    observed = {event.knows[0]: number for number, event in enumerate(events) if event.kind == "observation"}
    owner = {number: call for call, number in observed.items()}
    newest, state = dict[int, int](), dict[str, int]()
    units = []
    for number, event in enumerate(events):
        if any(known >= number for known in event.knows):
            raise ValueError(f"event {number} knows {event.knows}: an event knows only earlier ones")
        if number in owner:
            continue
        needs = {owner.get(known, known) for known in event.knows}
        if event.thread in newest:
            needs.add(newest[event.thread])
        newest[event.thread] = number
        if event.kind == "call" and event.tag in run.stateful:
            if event.tag in state:
                needs.add(state[event.tag])
            state[event.tag] = number
        both = (event, events[observed[number]]) if number in observed else (event,)
        if event.kind == "call" and len(both) == 1:
            raise ValueError(f"event {number}: a call without an observation")
        units.append(_Unit(number, both, frozenset(needs)))
    return units


def _ordered(units: Sequence[_Unit]) -> Iterator[_Unit]:
    """Each unit after those that it needs. Of the units that could be next, one of the same thread as the unit before
    is taken, or else one of the thread with the lowest number. So a job stays in one piece where possible, even if
    other jobs ran at the same time. The answer is last."""
    left, done, thread = list(units), set[int](), -1
    while left:
        ready = [unit for unit in left if unit.needs <= done]
        chosen = min(ready, key=lambda u: (u.events[0].kind == "answer", u.thread != thread, u.thread, u.number))
        left.remove(chosen)
        done.add(chosen.number)
        thread = chosen.thread
        yield chosen


def _merged(run: Run, units: Sequence[_Unit]) -> Iterator[Event]:
    """Leaves out what the sequence has already: a report or thought that repeats an earlier message, a message
    that its role says twice in a row, and a call whose author could not know that another agent had made it."""
    numbers = {id(event): number for number, event in enumerate(run.events)}
    said = set[str]()
    answered = dict[tuple[str, str], int]()
    before: Event | None = None
    for unit in units:
        first, last = unit.events[0], unit.events[-1]
        if first.call is not None:
            key = (first.call.key(), last.text)
            stands = answered.get(key)
            if stands is not None and stands not in first.knows and first.tag not in run.stateful:
                continue
            answered.setdefault(key, numbers[id(last)])
        text = " ".join(last.text.split())
        repeats = before is not None and (before.tag, before.text) == (last.tag, last.text)
        if last.kind == "text" and (repeats or (last.tag == roles.THINK and text in said)):
            continue
        said.add(text)
        before = last
        yield from unit.events
