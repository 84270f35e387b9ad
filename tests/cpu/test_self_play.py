"""A model as the system that is distilled: its episodes as runs, and `icrl distill` with a model that can play."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from agent_systems import archive

pytest.importorskip("bm25s")

from whole_runs import icrl

from icrl_megatron.agents.formats import Qwen3
from icrl_megatron.distill import command, records
from icrl_megatron.distill.events import Run
from icrl_megatron.distill.linear import linear
from icrl_megatron.distill.self_play import CRITIC, SOLVER, run_of
from icrl_megatron.distill.trajectory import Tokens
from icrl_megatron.evaluation import system
from icrl_megatron.settings.loading import load
from icrl_megatron.tasks.tool_use import ToolEnvironment
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Turn
from icrl_megatron.utils.errors import ConfigError

TASK = archive().problems("train")[0]
LONG = Completion((1, 2, 3), (0.0, 0.0, 0.0), "stop", 0)


def turn(text: str, observation: str = "", *, action: bool = True, chars: tuple[int, ...] = ()) -> Turn:
    return Turn(LONG, text, text if action else None, observation, (4, 5) if observation else (), answer_chars=chars)


def attempt(round: int, *turns: Turn, success: bool = False) -> Attempt:
    return Attempt(round, (7,) * (10 + round), (7,) * 10, turns, float(success), success, "outdated", "done")


def played(*attempts: Attempt, critiques: tuple[str, ...] = (), environment: ToolEnvironment | None = None) -> Run:
    said = tuple(Critique(i, (8,) * 20, LONG, text) for i, text in enumerate(critiques))
    return run_of(Episode(TASK, 3, attempts, said), environment or archive().environment(TASK))


def told(run: Run) -> list[str]:
    """What is left of a run in one sequence."""
    segments = linear(run).segments
    return [f"{s.kind} {s.agent} {' '.join(s.call.arguments.values()) if s.call else s.text}" for s in segments]


FAILED = (
    turn("<plan> home size </plan> <search> p 4 </search>", "p 4 lives in t 1"),
    turn("<search> t 1 </search>", "t 1 old note size 3"),
    turn("<answer> 3 </answer>"),
)
REVISED = (
    turn("<search> p 4 </search>", "p 4 lives in t 1"),
    turn("<page> t 1 </page>", "t 1 size 5"),
    turn("<answer> 5 </answer>"),
)


def test_attempt_critique_and_revision_become_one_sequence() -> None:
    """The revision's first call stands in the sequence already: its author could not know the attempt."""
    run = played(attempt(0, *FAILED), attempt(1, *REVISED, success=True), critiques=("page",))
    assert run.correct and (run.task_id, run.attempt, run.problem) == (TASK.task_id, 3, TASK.problem)
    assert told(run) == [
        "text plan home size",
        "call search p 4",
        "observation search p 4 lives in t 1",
        "call search t 1",
        "observation search t 1 old note size 3",
        "text suggested_answer 3",
        "text double_check 1 page",
        "call page t 1",
        "observation page t 1 size 5",
        "answer answer 5",
    ]
    knows = {event.thread: set[int]() for event in run.events}
    for event in run.events:
        knows[event.thread] |= set(event.knows)
    check = next(number for number, event in enumerate(run.events) if event.agent == CRITIC)
    assert knows[1] == set(range(check)) and min(knows[2]) == check, "the revision has read the critique only"


def test_tokens_are_those_of_every_request() -> None:
    run = played(attempt(0, *FAILED), attempt(1, *REVISED, success=True), critiques=("page",))
    # Each request reads what was sent and written before: 10, 15, 20 tokens, and one more in the revision.
    assert run.spent == {SOLVER: Tokens(10 + 15 + 20 + 11 + 16 + 21, 18), CRITIC: Tokens(20, 3)}


def test_a_right_first_attempt_has_no_check_and_a_silent_one_a_reflection() -> None:
    assert told(played(attempt(0, *REVISED, success=True)))[-1] == "answer answer 5"
    assert not any("check" in line or "suggested" in line for line in told(played(attempt(0, *REVISED, success=True))))
    silent = played(attempt(0, *FAILED[:2]), attempt(1, *REVISED, success=True), critiques=("<page> answer",))
    assert "text reflection < page> answer" in told(silent), "a critique cannot make a call"


@pytest.mark.parametrize(
    "text",
    [
        "home size",
        "<search> p 4",
        "<plan> <page> t 1 </plan> <search> p 4 </search>",
        "<observation> x <search> p </search>",
    ],
)
def test_replies_that_hold_nothing_or_too_much_are_counted_and_are_no_events(text: str) -> None:
    run = played(attempt(0, turn(text, "invalid", action="</search>" in text), *REVISED, success=True))
    assert run.unreadable == 1 and told(run) == told(played(attempt(0, *REVISED, success=True)))


def test_several_calls_in_one_reply_keep_their_own_answers() -> None:
    environment = archive().environment(TASK)
    environment.form = form = Qwen3([tool.spec for tool in environment.toolbox.tools.values()])  # type: ignore[assignment]
    asked = (("search", "query"), ("page", "town"))
    calls = [json.dumps({"name": name, "arguments": {key: "t 1"}}) for name, key in asked]
    text = "I look. " + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    assert form.parse(text)
    first, second = "two\nlines", "one"
    turns = turn(text, f"{first}\n{second}", chars=(9, 3)), turn("The answer is <answer>5</answer>")
    run = played(attempt(0, *turns, success=True), environment=environment)
    kinds = [(event.kind, event.tag, event.text) for event in run.events]
    assert kinds == [
        *[("text", "assistant", "I look."), ("call", "search", ""), ("call", "page", "")],
        *[("observation", "search", first), ("observation", "page", second), ("answer", "answer", "5")],
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "model.path is empty"),
        (("model.path=/nowhere",), "/nowhere: no such folder"),
        (("model.path=/nowhere", "rollout.critic=empty"), "only rollout.critic=self works"),
        (("model.path=/nowhere", "engine.urls=['http://h']"), "engine.urls is set"),
        (("model.path=/nowhere", "distill.agents=[{name: poet}]"), "no effect with distill.system=model"),
    ],
)  # fmt: skip
def test_wrong_settings_are_found_at_the_start(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command.prepare(load("archive", ["distill.system=model", *overrides]), tmp_path / "a.jsonl")


@pytest.mark.slow
def test_a_model_plays_with_itself_as_the_critic_and_learns_from_it(tmp_path: Path) -> None:
    """The model has learned the demonstrations of eight problems. A second call of the command plays nothing again."""
    small = ("archive_easy", "tasks.limit=8", f"run_dir={tmp_path / 'run'}")
    code, _, err = icrl("sft", *small, "warm_start.steps=150", "warm_start.episodes_per_step=8")
    assert code == 0, err
    out, model = tmp_path / "self.jsonl", tmp_path / "run" / "warm_start" / "hf"
    words = ("--out", str(out), "archive_easy", "tasks.limit=8", "distill.system=model", f"model.path={model}")
    more = ("distill.attempts=4", "distill.filters.leave_out=[complexity, duplicates, reflection]")
    code, said, err = icrl("distill", *words, *more)
    assert code == 0 and "32 of 32 attempts finished" in said, err
    report = json.loads(out.with_suffix(".report.json").read_text())
    assert set(report["tokens"]) == {SOLVER, CRITIC} and 0 < report["right"] <= 32
    written = out.read_text()
    assert "double_check" in written and "suggested_answer" in written
    runs = out.with_suffix(".runs.jsonl").read_bytes()
    for run in map(json.loads, runs.splitlines()[1:]):
        assert 0 < run["timing"]["agents"][SOLVER] < run["timing"]["seconds"]
        assert (CRITIC in run["timing"]["agents"]) is (CRITIC in run["spent"])
    code, _, err = icrl("distill", *words, *more, "rollout.concurrency=3")
    assert code == 0, err
    assert out.with_suffix(".runs.jsonl").read_bytes() == runs and out.read_text() == written


def test_held_out_problems_are_not_tried_again_after_the_grader_refused_an_answer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.rounds=2 with --heldout"):
        system.measure(load("archive", ["distill.system=model", "rollout.rounds=2"]), tmp_path / "a.jsonl")


def test_another_model_at_the_same_path_is_another_system(tmp_path: Path) -> None:
    settings = load("archive", ["distill.system=model", f"model.path={tmp_path}"])
    found = []
    for text in ("one", "two", "two"):
        (tmp_path / "model.safetensors").write_text(text)
        found.append(records.identity(settings, plays_model=True))
    assert found[0] != found[1] == found[2]
