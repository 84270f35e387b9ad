"""The multi-agent system: scripted on Archive, its tools, and how replies are read."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import asdict, replace

import pytest

pytest.importorskip("bm25s")

from agent_systems import archive, play

from icrl_megatron.agents.formats import make_format
from icrl_megatron.agents.judge import by_rule
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.agents.tools import Arguments, ToolSpec
from icrl_megatron.distill import roles, scripted
from icrl_megatron.distill.events import Failed, Run
from icrl_megatron.distill.linear import linear
from icrl_megatron.distill.roles import Member, Unreadable
from icrl_megatron.distill.system import System
from icrl_megatron.settings.distill_schema import DistillSettings
from icrl_megatron.settings.task_sections import Answers
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.tool_use import ToolEnvironment
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError


def scripted_system(name: str = "archive", seed: int = 0) -> System:
    return System(scripted.team(name), archive(name).environment, seed=seed)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    found = play(scripted_system(), list(archive().problems("train")[:100]), 2)
    done = [run for run in found if isinstance(run, Run)]
    assert len(done) == len(found) == 200
    return done


# --- scripted


def test_the_scripted_system_is_often_wrong_and_often_right(runs: list[Run]) -> None:
    assert 0.35 < sum(run.correct for run in runs) / len(runs) < 0.8


def test_checks_and_reflections_come_and_help(runs: list[Run]) -> None:
    tags = Counter(event.tag for run in runs for event in run.events if event.kind == "text")
    assert tags[roles.REFLECTION] > 5 and tags[roles.CHECK] > 5
    doubted = [run for run in runs if any(e.tag == roles.REFLECTION for e in run.events)]
    others = [run for run in runs if run not in doubted]
    assert sum(r.correct for r in doubted) / len(doubted) > sum(r.correct for r in others) / len(others)


def test_tokens_are_counted_by_agent(runs: list[Run]) -> None:
    for run in runs:
        assert {"planner", "searcher", "coder", "answerer"} <= set(run.spent)
        assert all(spent.read > 0 and spent.written > 0 for spent in run.spent.values())
        total = run.total()
        assert total.read == sum(spent.read for spent in run.spent.values()) > total.written > 0
        # What the answerer wrote are its suggestions, each of them between two tags.
        suggested = [e.text for e in run.events if e.tag == roles.SUGGESTION]
        assert run.spent["answerer"].written == sum(len(text.split()) + 2 for text in suggested)


def test_an_author_knows_only_what_came_before_and_what_its_words_need(runs: list[Run]) -> None:
    for run in runs:
        for number, event in enumerate(run.events):
            assert all(known < number for known in event.knows)
            if event.tag == "page" and event.call is not None:
                read = " ".join(run.events[known].text for known in event.knows)
                assert event.call.arguments["town"] in read


def test_the_seed_and_nothing_else_decides() -> None:
    tasks = list(archive().problems("train")[:8])

    def events(run: Run | Failed) -> list[str]:
        assert isinstance(run, Run)
        return sorted(f"{e.thread} {e.tag} {e.text} {e.call}" for e in run.events)

    one = {(r.task_id, r.attempt): events(r) for r in play(scripted_system(), tasks, 2, concurrency=1)}
    many = {(r.task_id, r.attempt): events(r) for r in play(scripted_system(), tasks, 2, concurrency=9)}
    assert one == many
    other = {(r.task_id, r.attempt): events(r) for r in play(scripted_system(seed=1), tasks, 2)}
    assert one != other


def test_a_run_comes_back_from_json(runs: list[Run]) -> None:
    assert all(Run.of_json(json.loads(json.dumps(asdict(run)))) == run for run in runs[:20])


def test_one_town_and_task_sets_without_a_team_or_tools() -> None:
    found = play(scripted_system("archive_easy"), list(archive("archive_easy").problems("train")[:40]))
    assert 0.3 < sum(isinstance(run, Run) and run.correct for run in found) / 40 < 0.95
    with pytest.raises(ConfigError, match="'household' has no scripted team"):
        scripted.team("household")
    household = registry.get("household")
    with pytest.raises(ConfigError, match="'household' has no tools"):
        play(System(scripted.team("archive"), household.environment), list(household.problems("train")[:1]))


def test_no_more_attempts_than_allowed_run_at_a_time() -> None:
    team, now, most = dict(scripted.team("archive")), 0, 0
    planner = team[roles.PLANNER]

    class Slow:
        async def reply(self, brief: roles.Brief) -> roles.AgentReply:
            nonlocal now, most
            now, most = now + 1, max(most, now + 1)
            await asyncio.sleep(0.01)
            now -= 1
            return await planner.agent.reply(brief)

    team[roles.PLANNER] = replace(planner, agent=Slow())
    play(System(team, archive().environment), list(archive().problems("train")[:12]), concurrency=3)
    assert most == 3


def test_an_attempt_that_takes_too_long_has_failed() -> None:
    class Asleep:
        async def reply(self, brief: roles.Brief) -> roles.AgentReply:
            await asyncio.sleep(60)
            raise AssertionError

    team = dict(scripted.team("archive"))
    team[roles.PLANNER] = replace(team[roles.PLANNER], agent=Asleep())
    system = System(team, archive().environment, DistillSettings(task_timeout_s=0.05))
    (failed,) = play(system, list(archive().problems("train")[:1]))
    assert isinstance(failed, Failed) and failed.kind == "time"


class Tally:
    """A tool with a state that takes its time: two calls at once would both read the same number."""

    spec = ToolSpec.of_text("count", "Adds one.", "why")

    def __init__(self) -> None:
        self.number = 0

    def open(self) -> Tally:
        return Tally()

    async def call(self, arguments: Arguments) -> str:
        number = self.number + 1
        await asyncio.sleep(0.001)
        self.number = number
        return f"number {number}"


class Counting:
    """A worker of two calls, and everybody else; those that start later are faster."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    async def reply(self, brief: roles.Brief) -> roles.AgentReply:
        await asyncio.sleep(0.01 / (1 + len(brief.job)))
        call = f'<tool_call>{{"name": "count", "arguments": {{"why": "{brief.job} {len(brief.own)}"}}}}</tool_call>'
        return roles.AgentReply(self.text or (call if len(brief.own) < 4 else "done"), 1, 1)


def test_answers_of_a_tool_with_a_state_stand_in_the_order_in_which_they_were_given() -> None:
    box = Toolbox([Tally()], ToolLimits())
    form = make_format("qwen3", [Tally.spec])
    plan = "<plan>worker: a\nworker: bb\nworker: ccc\nthen\nworker: d</plan>"
    said = {"planner": plan, "reflector": "enough", "answerer": "<answer>8</answer>", "verifier": "pass", "worker": ""}
    team = {name: Member(Counting(text)) for name, text in said.items()}

    def environment(task: Task) -> ToolEnvironment:
        return ToolEnvironment("count", form, box, by_rule(lambda answer: float(answer == "8")), 20, Answers())

    (run,) = play(System(team, environment), [Task("t/train/0", "t", "train", "count")])
    assert isinstance(run, Run) and run.correct and run.stateful == ("count",)
    observed = [s.text for s in linear(run).segments if s.kind == "observation"]
    assert observed == [f"number {n}" for n in range(1, 9)]
    by_thread = sorted((e for e in run.events if e.kind == "observation"), key=lambda e: e.thread)
    assert [e.text for e in by_thread] != observed


# --- reading replies


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("searcher: x", "write <plan>"),
        ("<plan></plan>", "<plan> is empty"),
        ("<plan>poet: x</plan>", "a line of the plan is 'poet: x'"),
        ("<plan>searcher:</plan>", "write AGENT: JOB"),
        ("<plan>then\nthen</plan>", "the plan has 0 jobs"),
        ("<plan>" + "searcher: x\n" * 33 + "</plan>", "the plan has 33 jobs"),
    ],
)
def test_plans_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        roles.read_plan(text, ("searcher", "coder"))


def test_plans_thoughts_and_checks() -> None:
    plan = roles.read_plan("<plan>searcher: a: b\ncoder: c\nTHEN\ncoder: d\nthen</plan>", ("searcher", "coder"))
    jobs = [[(job.agent, job.text) for job in stage] for stage in plan.stages]
    assert jobs == [[("searcher", "a: b"), ("coder", "c")], [("coder", "d")]]
    assert roles.thought("<think>why</think> yes") == ("why", "yes")
    with pytest.raises(Unreadable, match="not closed"):
        roles.thought("<think>why")
    assert [roles.score_of(text) for text in ("1 doubt", "Score: 4. Fine")] == [1, 4]
    assert [roles.score_of(text) for text in ("5", "12", "no", "3.5")] == [None] * 4
    assert roles.read_check("pass") == "" and roles.read_reflection("Enough.") == ""
    with pytest.raises(Unreadable, match="score from 1 to 4"):
        roles.read_check("<double_check>fine</double_check>")
