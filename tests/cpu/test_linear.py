"""Linearization: nothing is said before it could be known, and nothing is lost but repetitions."""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("bm25s")

from icrl_megatron.agents.tools import ToolCall
from icrl_megatron.distill import roles, scripted
from icrl_megatron.distill.events import Event, Failed, Run
from icrl_megatron.distill.linear import linear
from icrl_megatron.distill.system import System, play_all
from icrl_megatron.distill.trajectory import Segment, Tokens, Trajectory
from icrl_megatron.tasks import registry

FACT = re.compile(r"fact\d+")
TAGS = (roles.PLAN, roles.THINK, roles.REFLECTION, roles.SUGGESTION, roles.CHECK)


def run_of(events: list[Event], stateful: tuple[str, ...] = ()) -> Run:
    return Run("t/train/0", 0, "?", tuple(events), True, {"a": Tokens(3, 2), "b": Tokens(4, 1)}, stateful=stateful)


def said(segment: Segment) -> str:
    return f"{segment.text} {segment.call.arguments if segment.call else ''}"


def unknown_words(trajectory: Trajectory) -> list[str]:
    """Facts that stand before the observation that made them known."""
    known, wrong = set[str](), []
    for segment in trajectory.segments:
        found = FACT.findall(said(segment))
        if segment.kind != "observation":
            wrong += [fact for fact in found if fact not in known]
        known.update(found)
    return wrong


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Threads that run at the same time. An author quotes only facts of events that it has read; equal calls have equal
    answers, and each different answer is a fact of its own."""
    events: list[Event] = []
    open_calls: list[int] = []

    def words(knows: list[int]) -> str:
        facts = sorted({fact for number in knows for fact in FACT.findall(told(number))})
        return " ".join(draw(st.lists(st.sampled_from(facts), max_size=2))) if facts else ""

    def told(number: int) -> str:
        call = events[number].call
        return f"{events[number].text} {call.arguments if call else ''}"

    def answer(number: int) -> None:
        asked = events[number]
        assert asked.call is not None
        fact = f"fact{sum(map(ord, asked.call.key()))}"
        events.append(Event("agent", asked.tag, "observation", fact, (number,), asked.thread))

    for _ in range(draw(st.integers(1, 24))):
        thread = draw(st.integers(0, 4))
        waiting = [n for n in open_calls if events[n].thread == thread]
        if waiting or (open_calls and draw(st.booleans())):
            number = waiting[0] if waiting else open_calls[0]
            answer(number)
            open_calls.remove(number)
            continue
        shown = [n for n, e in enumerate(events) if n not in open_calls]
        knows = draw(st.lists(st.sampled_from(shown), unique=True, max_size=4)) if shown else []
        knows = sorted({*knows, *(n for n in shown if events[n].thread == thread)})
        quoted = words(knows)
        if draw(st.booleans()):
            call = ToolCall("look", {"at": f"{draw(st.sampled_from('xyz'))} {quoted}"})
            open_calls.append(len(events))
            events.append(Event(f"agent{thread}", "look", "call", "", tuple(knows), thread, call))
        else:
            events.append(Event(f"agent{thread}", draw(st.sampled_from(TAGS)), "text", quoted, tuple(knows), thread))
    for number in open_calls:
        answer(number)
    return run_of(events)


@given(runs())
@settings(max_examples=300, deadline=None)
def test_nothing_is_said_before_it_could_be_known(run: Run) -> None:
    trajectory = linear(run)
    assert unknown_words(trajectory) == []
    kinds = [s.kind for s in trajectory.segments]
    assert all(kinds[i + 1] == "observation" for i, kind in enumerate(kinds) if kind == "call")
    # Nothing is lost: every call, and every text of every role but for repetitions of what stands there.
    assert {s.call.key() for s in trajectory.segments if s.call} == {e.call.key() for e in run.events if e.call}
    texts = {(s.agent, s.text) for s in trajectory.segments}
    assert {(e.tag, e.text) for e in run.events if e.kind == "text" and e.tag != roles.THINK} <= texts
    assert {e.text for e in run.events} - {""} <= {s.text for s in trajectory.segments}


@given(runs(), st.randoms())
@settings(max_examples=100, deadline=None)
def test_which_thread_was_faster_does_not_matter(run: Run, rng: random.Random) -> None:
    """Another order in time in which everybody knows the same."""
    left, order = list(range(len(run.events))), list[int]()
    while left:
        ready = [
            n
            for n in left
            if set(run.events[n].knows) <= set(order)
            and not any(m < n and run.events[m].thread == run.events[n].thread for m in left)
        ]
        order.append(rng.choice(ready))
        left.remove(order[-1])
    place = {old: new for new, old in enumerate(order)}
    events = [replace(run.events[n], knows=tuple(sorted(place[k] for k in run.events[n].knows))) for n in order]
    one, other = linear(run), linear(run_of(events))
    # An observation that arrives while another call of its thread is open may change places with it: only there.
    assert [s for s in one.segments if s.kind == "call"] == [s for s in other.segments if s.kind == "call"]
    assert one == other


def call(thread: int, query: str, *knows: int) -> Event:
    return Event(f"s{thread}", "search", "call", "", knows, thread, ToolCall("search", {"query": query}))


def seen(thread: int, text: str, asked: int) -> Event:
    return Event(f"s{thread}", "search", "observation", text, (asked,), thread)


def text(tag: str, words: str, thread: int, *knows: int) -> Event:
    return Event(tag, tag, "text", words, knows, thread)


def shown(run: Run) -> list[str]:
    return [f"{s.agent}:{s.call.arguments['query'] if s.call else s.text}" for s in linear(run).segments]


def test_jobs_that_ran_at_the_same_time_stand_one_after_the_other() -> None:
    events = [
        text("plan", "do", 0),
        call(1, "a", 0), call(2, "b", 0), seen(2, "fact2", 2), seen(1, "fact1", 1), call(1, "c", 0, 1, 4),
        seen(1, "fact3", 5), text("think", "fact2", 2, 0, 2, 3), text("think", "both", 1, 0, 1, 4, 5, 6),
    ]  # fmt: skip
    assert shown(run_of(events)) == [
        "plan:do", "search:a", "search:fact1", "search:c", "search:fact3", "think:both", "search:b", "search:fact2",
    ]  # fmt: skip


def test_a_thread_that_waited_for_another_stands_after_what_it_read() -> None:
    """Thread 1 reads what thread 2 found, so thread by thread would say fact2 too early."""
    events = [call(1, "a"), seen(1, "fact1", 0), call(2, "b"), seen(2, "fact2", 2), text("think", "fact2!", 1, 0, 1, 3)]
    assert unknown_words(linear(run_of(events))) == []
    by_thread = sorted(events, key=lambda event: event.thread)
    segments = tuple(Segment(e.tag, e.text, e.kind, e.kind != "observation", e.call) for e in by_thread)
    naive = Trajectory("t", "?", segments)
    assert unknown_words(naive) == ["fact2"]


def test_repetitions_are_merged_only_where_the_author_could_not_know() -> None:
    unaware = [call(1, "a"), call(2, "a"), seen(1, "fact1", 0), seen(2, "fact1", 1)]
    assert shown(run_of(unaware)) == ["search:a", "search:fact1"]
    assert len(shown(run_of(unaware, stateful=("search",)))) == 4
    other_answer = [*unaware[:3], seen(2, "fact2", 1)]
    assert len(shown(run_of(other_answer))) == 4
    aware = [call(1, "a"), seen(1, "fact1", 0), call(1, "a", 0, 1), seen(1, "fact1", 2)]
    assert len(shown(run_of(aware))) == 4


def test_calls_of_a_tool_with_a_state_keep_their_order() -> None:
    """The answer to b depends on the call a of another agent, which b's author did not know."""
    events = [
        text("plan", "do", 0),
        call(2, "a", 0), seen(2, "1", 1), call(1, "b", 0), seen(1, "2", 3), call(2, "c", 0, 1, 2), seen(2, "3", 5),
    ]  # fmt: skip
    said_in_order = [line.partition(":")[2] for line in shown(run_of(events))]
    assert said_in_order == ["do", "b", "2", "a", "1", "c", "3"]
    with_state = [line.partition(":")[2] for line in shown(run_of(events, stateful=("search",)))]
    assert with_state == ["do", "a", "1", "b", "2", "c", "3"]


def test_an_unchecked_suggestion_is_the_answer() -> None:
    events = [text(roles.SUGGESTION, "4 2", 0), Event("answerer", "answer", "answer", "4 2", (0,), 1)]
    assert shown(run_of(events)) == ["answer:4 2"]
    checked = [events[0], text(roles.CHECK, "4", 1, 0), replace(events[1], knows=(0, 1), thread=2)]
    assert shown(run_of(checked)) == ["suggested_answer:4 2", "double_check:4", "answer:4 2"]


def test_runs_without_order_are_refused() -> None:
    with pytest.raises(ValueError, match="knows only earlier ones"):
        linear(run_of([text("plan", "x", 0, 0)]))
    with pytest.raises(ValueError, match="without an observation"):
        linear(run_of([call(0, "a")]))


def test_archive_as_one_sequence() -> None:
    archive = registry.get("archive")
    found: list[Run | Failed] = []
    jobs = [(task, 0) for task in archive.problems("train")[:40]]
    asyncio.run(play_all(System(scripted.team("archive"), archive.environment), jobs, 8, found.append))
    for run in found:
        assert isinstance(run, Run)
        trajectory = linear(run)
        assert trajectory.segments[0].agent == "plan" and trajectory.segments[-1].kind == "answer"
        assert trajectory.spent == run.total() and trajectory.correct == run.correct
        # The searcher's and a careful coder's reports repeat what the tools said; a wrong sum stays.
        thoughts = [s.text for s in trajectory.segments if s.agent == roles.THINK]
        assert all(re.fullmatch(r"[\d ]+", text) for text in thoughts)
        assert len(trajectory.segments) < len(run.events)
