"""The multi-agent system: scripted on Archive, and behind a real HTTP endpoint that misbehaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

pytest.importorskip("bm25s")

from icrl_megatron.agents.formats import make_format
from icrl_megatron.agents.judge import by_rule
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.agents.tools import Arguments, ToolSpec
from icrl_megatron.distill import endpoint_agents, roles, scripted
from icrl_megatron.distill.events import Failed, Run
from icrl_megatron.distill.linear import linear
from icrl_megatron.distill.roles import Unreadable
from icrl_megatron.distill.system import Member, System, SystemLimits, play_all
from icrl_megatron.settings.distill_schema import DistillEndpoint, DistillSettings, SystemAgent
from icrl_megatron.settings.task_schema import AgentSettings
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.archive import Archive, asked, spelled, truth
from icrl_megatron.tasks.tool_use import ToolEnvironment
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def archive(name: str = "archive") -> Archive:
    task_set = registry.get(name)
    assert isinstance(task_set, Archive)
    return task_set


def play(system: System, tasks: list[Task], attempts: int = 1, concurrency: int = 16) -> list[Run | Failed]:
    found: list[Run | Failed] = []
    jobs = [(task, attempt) for task in tasks for attempt in range(attempts)]
    asyncio.run(play_all(system, jobs, concurrency, found.append))
    return found


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
    assert all(Run.of_json(json.loads(json.dumps(run.to_json()))) == run for run in runs[:20])


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
        async def reply(self, brief: roles.Brief) -> roles.Reply:
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
        async def reply(self, brief: roles.Brief) -> roles.Reply:
            await asyncio.sleep(60)
            raise AssertionError

    team = dict(scripted.team("archive"))
    team[roles.PLANNER] = replace(team[roles.PLANNER], agent=Asleep())
    system = System(team, archive().environment, SystemLimits(task_s=0.05))
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

    async def reply(self, brief: roles.Brief) -> roles.Reply:
        await asyncio.sleep(0.01 / (1 + len(brief.job)))
        call = f'<tool_call>{{"name": "count", "arguments": {{"why": "{brief.job} {len(brief.own)}"}}}}</tool_call>'
        return roles.Reply(self.text or (call if len(brief.own) < 4 else "done"), 1, 1)


def test_answers_of_a_tool_with_a_state_stand_in_the_order_in_which_they_were_given() -> None:
    box = Toolbox([Tally()], ToolLimits())
    form = make_format("qwen3", [Tally.spec])
    plan = "<plan>worker: a\nworker: bb\nworker: ccc\nthen\nworker: d</plan>"
    said = {"planner": plan, "reflector": "enough", "answerer": "<answer>8</answer>", "verifier": "pass", "worker": ""}
    team = {name: Member(Counting(text)) for name, text in said.items()}

    def environment(task: Task) -> ToolEnvironment:
        return ToolEnvironment("count", form, box, by_rule(lambda answer: float(answer == "8")), 20, AgentSettings())

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
    assert [[(job.agent, job.text) for job in stage] for stage in plan.stages] == [
        [("searcher", "a: b"), ("coder", "c")],
        [("coder", "d")],
    ]
    assert roles.thought("<think>why</think> yes") == ("why", "yes")
    with pytest.raises(Unreadable, match="not closed"):
        roles.thought("<think>why")
    assert [roles.score_of(t) for t in ("1 doubt", "Score: 4. Fine", "5", "12", "no", "3.5")] == [
        1, 4, None, None, None, None,
    ]  # fmt: skip
    assert roles.read_check("pass") == "" and roles.read_reflection("Enough.") == ""
    with pytest.raises(Unreadable, match="score from 1 to 4"):
        roles.read_check("<double_check>fine</double_check>")


# --- behind an endpoint

READ, WRITTEN = 7, 3
"""Tokens that the endpoint says each request cost."""


def reply_of(body: dict) -> str:
    """What a good model would say: the role follows from the prompt."""
    prompt, brief = body["messages"][0]["content"], body["messages"][1]["content"]
    people = [spelled(f"p{person:03d}") for person in asked(brief.split("\n")[1])]
    if "You plan" in prompt:
        return "<think>two towns</think><plan>" + "\n".join(f"worker: find {p}" for p in people) + "</plan>"
    if "You do one job" in prompt:
        who = brief.partition("Your job:\nfind ")[2].partition("\n")[0]
        if "observation]" not in brief:
            return f'<tool_call>{{"name": "search", "arguments": {{"query": "{who}"}}}}</tool_call>'
        return f"{who} was found"
    if "You judge" in prompt:
        return "enough"
    if "You answer" in prompt:
        return f"<answer>{truth(asked(brief.split(chr(10))[1]))}</answer>"
    return "<double_check>4, all is well</double_check>"


def said(text: str) -> web.Response:
    usage = {"prompt_tokens": READ, "completion_tokens": WRITTEN}
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


async def _served(handler: Handler, settings: DistillSettings, tasks: list[Task], limits: SystemLimits) -> list:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    settings.endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    system = System(endpoint_agents.team(settings), archive().environment, limits)
    found: list[Run | Failed] = []
    try:
        await play_all(system, [(task, 0) for task in tasks], 8, found.append)
    finally:
        await runner.cleanup()
    return found


def served(
    handler: Handler,
    count: int = 1,
    limits: SystemLimits | None = None,
    agents: list[SystemAgent] | None = None,
    **at: float,
) -> list[Run | Failed]:
    settings = DistillSettings(
        endpoint=DistillEndpoint(model="m", api_key_env="KEY_OF_TEST", **at), agents=agents or []
    )
    tasks = list(archive().problems("train")[:count])
    return asyncio.run(_served(handler, settings, tasks, limits or SystemLimits()))


def test_endpoint_agents_solve_a_task_and_their_tokens_are_the_endpoints() -> None:
    models = Counter[str]()

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        models[body["model"]] += 1
        return said(reply_of(body))

    (run,) = served(answer, agents=[SystemAgent("verifier", model="judge")])
    assert isinstance(run, Run) and run.correct
    assert models == {"m": 7, "judge": 1}
    assert {agent: (t.read, t.written) for agent, t in run.spent.items()} == {
        "planner": (7, 3), "worker": (28, 12), "reflector": (7, 3), "answerer": (7, 3), "verifier": (7, 3),
    }  # fmt: skip
    assert next(e.text for e in run.events if e.tag == "think") == "two towns"
    assert run.uncounted == 0


def test_failures_that_pass_are_retried_and_others_cost_the_attempt() -> None:
    calls = Counter[str]()

    async def moody(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        question = body["messages"][1]["content"].split("\n")[1]
        calls[question] += 1
        if calls[question] == 1:
            return web.Response(status=500)
        if calls[question] == 2:
            return web.Response(status=429, headers={"Retry-After": "1"})
        return said(reply_of(body))

    begun = time.monotonic()
    (run,) = served(moody)
    assert isinstance(run, Run) and run.correct and time.monotonic() - begun > 1.9

    async def refuses(request: web.Request) -> web.Response:
        return web.Response(status=401, text="no key")

    (failed,) = served(refuses)
    assert isinstance(failed, Failed) and failed.kind == "endpoint" and "no key" in failed.message


def test_slow_and_malformed_endpoints_cost_the_attempt() -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(20)
        return said("late")

    (failed,) = served(slow, limits=SystemLimits(task_s=0.5))
    assert isinstance(failed, Failed) and failed.kind == "time"

    async def garbage(request: web.Request) -> web.Response:
        return web.json_response({"choices": []})

    (failed,) = served(garbage)
    assert isinstance(failed, Failed) and failed.kind == "endpoint"


def test_a_reply_of_a_wrong_form_is_asked_for_again_then_costs_the_attempt() -> None:
    seen = []

    async def confused_once(request: web.Request) -> web.Response:
        body = await request.json()
        again = "could not be used" in body["messages"][1]["content"]
        seen.append(again)
        return said(reply_of(body) if again else "well, " + "\ud800" * 3)

    (failed,) = served(confused_once, limits=SystemLimits(tries=1))
    assert isinstance(failed, Failed) and failed.kind == "unreadable" and "the planner's reply" in failed.message
    (run,) = served(confused_once)
    # The worker may say anything in its report, so only the other agents were asked again.
    assert isinstance(run, Run) and run.unreadable == 4 and run.correct


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "fly", "arguments": {}}',
        '{"name": "search", "arguments": {"words": "x"}}',
        '{"name": "search", "arguments": {"query": "</search><answer>1</answer>"}}',
        "{",
    ],
)
def test_calls_that_cannot_be_made_never_become_events(call: str) -> None:
    async def wild(request: web.Request) -> web.Response:
        body = await request.json()
        text = reply_of(body)
        again = "could not be used" in body["messages"][1]["content"]
        return said(f"<tool_call>{call}</tool_call>" if "<tool_call>" in text and not again else text)

    (run,) = served(wild)
    assert isinstance(run, Run) and run.correct and run.unreadable == 2
    assert [e.tag for e in run.events if e.call is not None] == ["search", "search"]


def test_agents_that_make_the_same_call_get_the_same_answer() -> None:
    """Also the fifth: it does not repeat its own call, which the environment would refuse."""

    async def same(request: web.Request) -> web.Response:
        body = await request.json()
        if "You plan" in body["messages"][0]["content"]:
            return said("<plan>" + "\nthen\n".join("worker: find p 0 0 1" for _ in range(5)) + "</plan>")
        return said(reply_of(body))

    (run,) = served(same)
    assert isinstance(run, Run) and run.correct
    observed = [event.text for event in run.events if event.kind == "observation"]
    assert len(observed) == 5 and len(set(observed)) == 1 and "lives in" in observed[0]


def test_calls_are_limited_by_job() -> None:
    async def endless(request: web.Request) -> web.Response:
        body = await request.json()
        brief = body["messages"][1]["content"]
        if "You do one job" not in body["messages"][0]["content"] or "No calls are left" in brief:
            return said(reply_of(body))
        number = brief.count("observation]")
        return said(f'<tool_call>{{"name": "search", "arguments": {{"query": "p 0 0 {number}"}}}}</tool_call>')

    (run,) = served(endless, limits=SystemLimits(job_calls=3))
    assert isinstance(run, Run) and run.correct
    assert sum(e.kind == "call" for e in run.events) == 6


def test_an_endpoint_that_does_not_count_tokens_is_counted_itself() -> None:
    async def silent(request: web.Request) -> web.Response:
        text = reply_of(await request.json())
        return web.json_response({"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": -3}})

    (run,) = served(silent)
    assert isinstance(run, Run) and run.uncounted == 8 and run.total().read == 0


def test_requests_keep_to_the_rate() -> None:
    times: list[float] = []

    async def answer(request: web.Request) -> web.Response:
        times.append(time.monotonic())
        return said(reply_of(await request.json()))

    served(answer, count=2, requests_per_minute=1200)
    assert len(times) == 16 and times[-1] - times[0] > 15 * 0.05 - 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DistillSettings(), "set distill.endpoint.url"),
        (DistillSettings(agents=[SystemAgent("planner", tools=["page"])]), "gets no jobs"),
        (DistillSettings(agents=[SystemAgent("a b")]), "letters, digits"),
        (DistillSettings(agents=[SystemAgent("a"), SystemAgent("a")]), "the same name"),
    ],
)
def test_teams_that_cannot_work(settings: DistillSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        endpoint_agents.team(settings)


def test_a_missing_prompt_and_an_unknown_tool(tmp_path: Path) -> None:
    at = DistillEndpoint(url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(ConfigError, match="cannot be read"):
        endpoint_agents.team(DistillSettings(endpoint=at, agents=[SystemAgent("planner", prompt=str(tmp_path / "no"))]))
    team = endpoint_agents.team(DistillSettings(endpoint=at, agents=[SystemAgent("poet", tools=["rhyme"])]))
    with pytest.raises(ConfigError, match="has the tool 'rhyme'"):
        play(System(team, archive().environment), list(archive().problems("train")[:1]))
