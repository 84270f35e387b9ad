"""Agents of a system behind a real HTTP endpoint that misbehaves."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from local_servers import Replies, serving

pytest.importorskip("bm25s")

from agent_systems import archive

from icrl_megatron.distill import endpoint_agents
from icrl_megatron.distill.environments import check_tools
from icrl_megatron.distill.events import Failed, Run
from icrl_megatron.distill.system import System, play_all
from icrl_megatron.settings.distill_schema import DistillEndpoint, DistillSettings, SystemAgent
from icrl_megatron.tasks.archive import asked, spelled, truth
from icrl_megatron.utils.errors import ConfigError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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


def served(
    handler: Handler,
    count: int = 1,
    bounds: dict[str, Any] | None = None,
    agents: list[SystemAgent] | None = None,
    **at: float,
) -> list[Run | Failed]:
    found: list[Run | Failed] = []

    async def play() -> None:
        async with serving(web.post("/v1/chat/completions", handler)) as url:
            endpoint = DistillEndpoint(url=f"{url}/v1", model="m", api_key_env="KEY_OF_TEST", **at)
            settings = DistillSettings(endpoint=endpoint, agents=agents or [], **(bounds or {}))
            system = System(endpoint_agents.team(settings), archive().environment, settings)
            await play_all(system, [(task, 0) for task in archive().problems("train")[:count]], 8, found.append)

    asyncio.run(play())
    return found


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


def test_failures_that_pass_are_retried_and_others_cost_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "sk-12345678")
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
        return web.Response(status=401, text="x" * 280 + f" no key: {request.headers['Authorization']}")

    (failed,) = served(refuses)
    assert isinstance(failed, Failed) and failed.kind == "endpoint" and "no key" in failed.message
    assert "sk-1" not in failed.message and "Bearer" in failed.message


def test_slow_and_malformed_endpoints_cost_the_attempt() -> None:
    async def slow(request: web.Request) -> web.Response:
        await asyncio.sleep(20)
        return said("late")

    (failed,) = served(slow, bounds={"task_timeout_s": 0.5})
    assert isinstance(failed, Failed) and failed.kind == "time"

    (failed,) = served(Replies({"choices": []}).answer)
    assert isinstance(failed, Failed) and failed.kind == "endpoint"


def test_a_reply_of_a_wrong_form_is_asked_for_again_then_costs_the_attempt() -> None:
    seen = []

    async def confused_once(request: web.Request) -> web.Response:
        body = await request.json()
        again = "could not be used" in body["messages"][1]["content"]
        seen.append(again)
        return said(reply_of(body) if again else "well, " + "\ud800" * 3)

    (failed,) = served(confused_once, bounds={"tries": 1})
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

    (run,) = served(endless, bounds={"job_calls": 3})
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


BAD_URLS = {
    "http://me:pw12345678@host/v1": "url=http://host/v1: has a user name or password; leave it out",
    "http://host:port/v1": "not an address",
    "http://": "not an address",
    "http://host/v1?key=pw12345678": "url=http://host/v1: has a query",
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DistillSettings(), "set distill.endpoint.url"),
        (DistillSettings(agents=[SystemAgent("planner", tools=["page"])]), "gets no jobs"),
        (DistillSettings(agents=[SystemAgent("a b")]), "letters, digits"),
        (DistillSettings(agents=[SystemAgent("a"), SystemAgent("a")]), "the same name"),
        *(
            (DistillSettings(endpoint=DistillEndpoint(url=url, model="m")), message)
            for url, message in BAD_URLS.items()
        ),
    ],
)
def test_teams_that_cannot_work(settings: DistillSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        endpoint_agents.team(settings)
    assert "pw12345678" not in str(refused.value)


def test_a_missing_prompt_and_an_unknown_tool(tmp_path: Path) -> None:
    at = DistillEndpoint(url="http://127.0.0.1:9/v1", model="m")
    with pytest.raises(ConfigError, match="cannot be read"):
        endpoint_agents.team(DistillSettings(endpoint=at, agents=[SystemAgent("planner", prompt=str(tmp_path / "no"))]))
    team = endpoint_agents.team(DistillSettings(endpoint=at, agents=[SystemAgent("poet", tools=["rhyme"])]))
    with pytest.raises(ConfigError, match="has the tool 'rhyme'"):
        check_tools(team, archive().environment, archive().problems("train"))
