"""Logs of the steps of smolagents and OAgents are read as trajectories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trajectory_files import action, oagents, read_format, smolagents, write_jsonl

from icrl_megatron.agents.tools import ToolCall
from icrl_megatron.distill import readers
from icrl_megatron.distill.trajectory import Segment, Tokens


def test_the_logs_of_smolagents_are_read(tmp_path: Path) -> None:
    called, coded = read_format("smolagents", tmp_path)
    both = [Segment("search", "", "call", call=ToolCall("search", {"query": q})) for q in ("p0", "home of p0")]
    answers = [Segment("search", text, "observation", trained=False) for text in ("", "in t0\nat t0")]
    assert called.problem == "where is p0?" and called.segments == (*both, *answers, Segment("answer", "t0", "answer"))
    assert called.spent == Tokens(200, 14) and called.tools[0].parameters["properties"] == {"query": {"type": "string"}}
    said = [(s.agent, s.call.arguments["code"] if s.call else s.text) for s in coded.segments]
    assert said == [
        ("plan", "look"),
        ("think", "I look."),
        ("python_interpreter", "find('p1')"),
        ("python_interpreter", "Execution logs:\n\nno such name"),
        ("think", "Again."),
        ("python_interpreter", "print(search('p1'))"),
        ("python_interpreter", "Execution logs:\nin t1\nLast output from code snippet:\nNone"),
        ("think", "Done."),
        ("python_interpreter", "final_answer('t1')"),
        ("python_interpreter", ""),
        ("answer", "t1"),
    ]


def test_a_log_that_smolagents_itself_wrote_is_read() -> None:
    """`tools/record_smolagents.py` made it."""
    recorded = Path(__file__).parents[1] / "recorded" / "smolagents_1_26.jsonl"
    called, coded = (one.trajectory for one in readers.read(str(recorded)))
    assert called is not None and coded is not None
    assert (called.problem, called.spent) == ("How many nails and saws are there?", Tokens(50, 25))
    assert [(s.kind, s.agent, dict(s.call.arguments) if s.call else s.text) for s in called.segments] == [
        ("text", "plan", "1. Look up both.\n2. Add."),
        ("text", "think", "I look up both."),
        ("call", "stock", {"item": "nails"}),
        ("call", "stock", {"item": "saws"}),
        ("observation", "stock", ""),
        ("observation", "stock", "870\n12"),
        ("call", "add", {"a": 870, "b": 12}),
        ("observation", "add", "882"),
        ("text", "think", "The sum is known."),
        ("answer", "answer", "882"),
    ]
    programs = [s.call.arguments["code"] for s in coded.segments if s.call]
    seen = [s.text for s in coded.segments if s.kind == "observation"]
    assert programs == ["print(stock('nails'))", "open('stock')"] and "870" in seen[0] and "open" in seen[1]
    texts = [s.text for s in coded.segments if s.kind != "observation" and not s.call]
    assert texts == ["I look.", "I open a file.", "870"]


def test_results_of_smolagents_are_read(tmp_path: Path) -> None:
    """One row per run: `RunResult.dict()`, also of a run that had no step left and was asked for its answer."""
    steps = smolagents(1)
    last = action(5, error={"type": "AgentMaxStepsError", "message": "Reached max steps."}, action_output="t9")
    rows = [{"output": "t1", "state": "success", "steps": steps}, {"output": "t9", "steps": [*steps[:-1], last]}]
    messages = {"question": "a", "prediction": "b", "intermediate_steps": [{"role": "user", "content": "a"}]}
    path = write_jsonl(tmp_path / "runs.jsonl", [*rows, messages, {"task": "a", "steps": None}])
    whole, cut, wrong, none = readers.read(str(path))
    assert whole.trajectory and cut.trajectory
    assert whole.trajectory.segments == read_format("smolagents", tmp_path)[1].segments
    assert cut.trajectory.segments == (*whole.trajectory.segments[:-4], Segment("answer", "t9", "answer"))
    assert all("log agent.memory.get_full_steps()" in one.problem for one in (wrong, none))


@pytest.mark.parametrize(
    ("place", "bad"), [(0, ["line 1"]), (1, ["line 2", "line 1"]), (4, ["line 5", "line 1"]), (8, ["line 9", "line 5"])]
)
def test_a_broken_line_costs_the_run_that_it_may_belong_to(place: int, bad: list[str], tmp_path: Path) -> None:
    lines = [json.dumps(row) for n in (1, 2) for row in oagents(n)]
    lines.insert(place, '{"broken')
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    found = list(readers.read(str(path)))
    unread = [one for one in found if one.trajectory is None]
    assert [one.where.rpartition(", ")[2] for one in unread] == bad
    assert len(found) - len(bad) == (2 if place == 0 else 1) and all("broken" in one.problem for one in unread)
    steps = [action(1, action_output="x", is_final_answer=True)]
    whole = write_jsonl(tmp_path / "b.jsonl", [{"task": "q", "steps": steps}])
    whole.write_text(whole.read_text() + '{"broken\n' + whole.read_text())
    assert [one.trajectory is None for one in readers.read(str(whole))] == [True, False, False]
