"""The AgentGym client against real HTTP servers: both dialects of every environment, and every failure."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator

import local_servers
import pytest
from agentgym_server import TALKS, State, serving
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.algo.headers import headers_of
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.episode import EpisodeSetup, play
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.speakers import Ask, Seeds, Speakers
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import ServedSource
from icrl_megatron.settings.task_sections import ServerData
from icrl_megatron.tasks import agentgym_dialects as dialects
from icrl_megatron.tasks import servers
from icrl_megatron.tasks.agentgym import AgentGym, AgentGymEnvironment, probe
from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.tasks.servers import Pool, Refused
from icrl_megatron.telemetry.metrics import rollout_metrics
from icrl_megatron.types import Completion
from icrl_megatron.utils import connections

BOTH = [(name, dialect) for name in TALKS for dialect in "AB"]


pytestmark = pytest.mark.usefixtures("fast")


def gym(name: str, *urls: str, timeout_s: float = 10.0) -> AgentGym:
    data = ServerData(train=["0:4"], heldout=["4:6"], servers=list(urls), request_timeout_s=timeout_s)
    return AgentGym(ServedSource(name, data=data))


def first(task_set: AgentGym, index: int = 0) -> AgentGymEnvironment:
    """The environment of a training problem."""
    return task_set.environment(task_set.problems("train")[index])


def reply(name: str, action: str) -> str:
    return f"I think so. {action}" if name == "searchqa" else f"I think <action>no</action> <action> {action} </action>"


async def observed(environment: AgentGymEnvironment, name: str, *actions: str) -> list[str]:
    """The observations of an episode with these actions."""
    seen = [await environment.reset()]
    for action in actions:
        assert environment.parse(reply(name, action)) == action
        result = await environment.step(action)
        seen.append(result.observation)
        if result.done:
            break
    return seen


@pytest.mark.parametrize(("name", "dialect"), BOTH)
def test_a_recorded_episode_of_every_environment(name: str, dialect: str) -> None:
    problem, steps = TALKS[name]
    actions = [s[0] for s in steps if s[0] not in ("<answer>Rome</answer>", "focus on sink")]
    with serving(name, dialect) as (url, state):
        environment = first(gym(name, url), 2)
        seen = asyncio.run(observed(environment, name, *actions))
        assert len(seen) == len(actions) + 1 and problem in seen[0]
        assert seen[0].startswith(dialects.ENVIRONMENTS[name].instruction)
        assert [t for t, _ in state.open.values()] == [2]
        assert environment.success() is (name != "webshop")
        assert environment.outcome() == pytest.approx({"webshop": 0.6667, "babyai": 0.86}.get(name, 1.0))
        assert "Boil water." in seen[0] or name != "sciworld" or dialect == "B"
        # The next round resets the same environment on the same server.
        asyncio.run(environment.reset())
        assert (state.made, environment.outcome(), environment.success()) == (1, 0.0, False)


async def test_alfworld_lists_the_available_actions_at_the_start_and_after_an_action_without_effect() -> None:
    with serving("alfworld") as (url, _):
        seen = await observed(first(gym("alfworld", url)), "alfworld", "look", "move mug 1 to desk 1")
    assert seen[0].endswith("\nAVAILABLE ACTIONS: look,move mug 1 to desk 1")
    assert seen[1] == "Nothing happens.\nAVAILABLE ACTIONS: look" and seen[2] == "You move the mug 1."


async def test_any_answer_ends_a_search_episode() -> None:
    with serving("searchqa") as (url, _):
        environment = first(gym("searchqa", url))
        seen = await observed(environment, "searchqa", "<answer>Rome</answer>", "<answer>Paris</answer>")
    assert len(seen) == 2 and not environment.success() and "not solved" in environment.summary()


@pytest.mark.parametrize(
    ("actions", "outcomes"),
    [
        (["focus on stove", "look around", "focus on stove", "wait"], [0.75, 0.0, 0.75, 1.0]),
        (["focus on stove", "focus on sink"], [0.75, 0.0]),  # the last step's reward is -175
    ],
)
async def test_the_outcome_in_sciworld_is_its_score_but_at_least_0(actions: list[str], outcomes: list[float]) -> None:
    with serving("sciworld") as (url, _):
        environment = first(gym("sciworld", url))
        await environment.reset()
        for action, outcome in zip(actions, outcomes, strict=True):
            await environment.step(action)
            assert environment.outcome() == outcome


async def test_an_environment_is_closed_when_its_episode_is_over() -> None:
    with serving("babyai") as (url, state):
        task_set = gym("babyai", url)
        environment = first(task_set)
        await environment.reset()
        assert task_set.pool().servers[0].episodes == 1
        del environment
        gc.collect()
        for _ in range(200):
            if state.calls["/close"]:
                break
            await asyncio.sleep(0.01)
        assert state.open == {} and task_set.pool().servers[0].episodes == 0


# Failures


@pytest.fixture
def textcraft() -> Iterator[tuple[str, State]]:
    with serving("textcraft") as pair:
        yield pair


def failure(url: str, timeout_s: float = 10.0) -> str:
    """The error of an episode of two steps."""
    environment = first(gym("textcraft", url, timeout_s=timeout_s))
    with pytest.raises(EnvironmentFailure) as raised:
        asyncio.run(observed(environment, "textcraft", "inventory", "craft 4 stick"))
    return str(raised.value)


@pytest.mark.parametrize(
    ("path", "what", "message"),
    [
        ("/step", [(200, {"error": "env died"})], "answered an error: env died"),
        ("/step", [(500, None)], "HTTP 500"),
        ("/step", ["drop"], "broke off"),
        ("/step", ["garbage"], "did not answer JSON"),
        ("/step", [(200, {"observation": "x", "reward": None, "done": False})], "reward None"),
        ("/step", [(200, {"observation": "x", "reward": 7, "done": False})], "reward of 7 is not between 0 and 1"),
        ("/step", [(200, {"observation": "x", "reward": -0.5, "done": False})], "reward of -0.5 is not between"),
        ("/step", [(200, {"state": "x", "reward": 0})], "is this textcraft"),
        ("/reset", [(200, {"error": {"code": "no_task", "message": "gone", "retryable": False}})], "no_task gone"),
        ("/reset", [(409, {"error": {"code": "busy", "message": "in use", "retryable": False}})], "HTTP 409"),
        ("/reset", [(200, [1])], "is this a server of textcraft"),
        ("/create", [(200, {"id": True})], "has no environment id"),
        ("/reset", [503] * 9, "HTTP 503"),
    ],
)
def test_a_server_error_fails_the_episode(
    textcraft: tuple[str, State], path: str, what: list[object], message: str
) -> None:
    url, state = textcraft
    state.fail[path] = what * (4 if path == "/create" else 1)
    assert message in failure(url)
    assert path != "/step" or state.calls["/step"] == 1  # a step is not repeated, even if its answer was lost


@pytest.mark.parametrize("status", [200, 400, 404, 409, 500])
@pytest.mark.parametrize("name", sorted(TALKS))
def test_an_error_of_dialect_b_fails_the_episode_in_every_environment(name: str, status: int) -> None:
    error = {"error": {"code": f"code_{status}", "message": "not so", "retryable": False, "details": {"env_id": 0}}}
    with serving(name, "B") as (url, state):
        state.fail["/step"] = [(status, error)]
        environment = first(gym(name, url))
        with pytest.raises(EnvironmentFailure, match=f"code_{status}"):
            asyncio.run(observed(environment, name, TALKS[name][1][0][0]))
        assert state.calls["/step"] == 1 and environment.outcome() == 0.0 and not environment.success()


@pytest.mark.parametrize("path", ["/reset", "/step", "/close"])
@pytest.mark.parametrize("name", sorted(TALKS))
async def test_an_environment_that_the_server_no_longer_has_fails_the_episode(name: str, path: str) -> None:
    """Depending on the server: HTTP 200 with an error, a bare 500, or 404. Closing never fails."""
    with serving(name) as (url, state):
        environment = first(gym(name, url))
        await environment.reset()
        state.open.clear()
        if path == "/close":
            await environment._session.close()  # type: ignore[union-attr]
        else:
            with pytest.raises(EnvironmentFailure, match=r"does not exist|HTTP 500"):
                await (environment.reset() if path == "/reset" else environment.step("look"))
        assert environment.outcome() == 0.0


@pytest.mark.parametrize("reward", [7, -3, 1e300, None, "1", True])
async def test_a_reward_out_of_range_drops_its_episode_only(textcraft: tuple[str, State], reward: object) -> None:
    url, state = textcraft
    state.fail = {"/step": [(200, {"observation": "x", "reward": reward, "done": True})]}
    task_set = gym("textcraft", url)
    settings = RolloutSettings(templates="compact", context_tokens=512, max_turn_tokens=64, rounds=1, concurrency=1)
    prompter = Prompter(build_tokenizer(["<action>craft", "4", "stick</action>", *template_words("compact")]), settings)
    ids = prompter.encode_reply("<action>craft 4 stick</action>")

    class Crafts:
        async def reply(self, ask: Ask) -> Completion:
            return Completion(ids, (0.0,) * len(ids), "stop", 0)

    setup = EpisodeSetup(task_set.environment, prompter, settings)
    speakers = Speakers(Crafts(), Crafts())
    played, dropped = await play(task_set.problems("train"), 1, setup, lambda task, index: speakers, Seeds(0, 0))
    assert [e.attempts[0].outcome for e in played] == [1.0] * 3
    assert len(dropped) == 1 and dropped[0].bad_answer and "reward" in dropped[0].error
    row = rollout_metrics(headers_of(played), dropped, CreditReport((), 0, 0, 0, 0))
    assert (row["infrastructure/bad_answers"], row["episodes/dropped"]) == (1, 1)


def test_passing_errors_are_retried(textcraft: tuple[str, State]) -> None:
    url, state = textcraft
    state.fail = {"/create": [503, "drop"], "/reset": ["drop", 502], "/step": [503]}
    environment = first(gym("textcraft", url))
    asyncio.run(observed(environment, "textcraft", "craft 4 stick"))
    assert environment.success()
    assert state.calls["/reset"] == 3 and state.calls["/step"] == 2


def test_a_call_fails_after_its_time_limit(textcraft: tuple[str, State]) -> None:
    url, state = textcraft
    state.fail = {"/step": ["hang"]}
    assert "did not answer within 0.3 s" in failure(url, timeout_s=0.3)


def test_a_step_does_not_use_a_connection_that_the_server_has_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an engine generates in this process, the event loop does not notice that a server ends idle connections."""
    monkeypatch.setattr(connections, "KEEP_ALIVE_S", 0.1)
    ready, done = threading.Event(), threading.Event()
    found: list[str] = []

    async def serve() -> None:
        answer = local_servers.Replies({"observation": "x"}).answer
        async with local_servers.serving(web.post("/step", answer), keepalive_timeout=0.3) as url:
            found.append(url)
            ready.set()
            await asyncio.to_thread(done.wait, 60)

    async def steps() -> None:
        pool = Pool(found, 5.0)
        for _ in range(2):
            await pool.call(pool.servers[0], "POST", "/step", {}, again=False)
            time.sleep(1.0)  # blocks the event loop, as a batch on the CPU does

    server = threading.Thread(target=asyncio.run, args=[serve()])
    server.start()
    try:
        assert ready.wait(30)
        asyncio.run(steps())
    finally:
        done.set()
        server.join(30)


def test_a_server_that_is_down_cannot_be_reached() -> None:
    assert "cannot be reached" in failure("http://127.0.0.1:9")


async def test_a_failing_server_gets_no_more_episodes() -> None:
    with serving("textcraft") as (good, state), serving("textcraft") as (bad, broken):
        broken.fail = {"/create": [503] * 1000}
        task_set = gym("textcraft", bad, good)
        for _ in range(12):
            await first(task_set).reset()
        assert state.made == 12
        assert broken.calls["/create"] <= 2 * servers.TRIES  # then it is paused
        assert next(s for s in task_set.pool().servers if s.url == bad).paused_until > 0


async def test_an_episode_stays_on_the_server_that_had_the_fewest() -> None:
    with serving("babyai") as (a, one), serving("babyai", "B") as (b, other):
        task_set = gym("babyai", a, b)
        environments = [first(task_set, i % 4) for i in range(8)]
        for environment in environments:
            await environment.reset()
        assert [s.episodes for s in task_set.pool().servers] == [4, 4]
        await asyncio.gather(*(e.step("go to ball") for e in environments))
        assert all(e.success() for e in environments)
        assert (one.made, other.made) == (4, 4)


def test_if_all_servers_fail_the_error_says_so() -> None:
    pool = Pool(["http://127.0.0.1:9"], 1.0)
    for _ in range(servers.MAX_FAILURES):
        pool.servers[0].failed()
    with pytest.raises(EnvironmentFailure, match="all 1 servers failed 5 times"):
        pool.choose()


@pytest.mark.parametrize("dialect", ["A", "B"])
def test_the_probe_finds_the_dialect(dialect: str) -> None:
    with serving("babyai", dialect) as (url, _):
        pool = Pool([url], 5.0)
        assert asyncio.run(probe(pool, pool.servers[0])) == dialect


def test_a_refusal_has_the_status_and_text_of_the_answer(textcraft: tuple[str, State]) -> None:
    pool = Pool([textcraft[0]], 5.0)
    with pytest.raises(Refused) as raised:
        asyncio.run(pool.call(pool.servers[0], "POST", "/reset", {}))
    assert raised.value.status == 422 and "field required" in str(raised.value)


@given(st.text(max_size=200), st.sampled_from(sorted(TALKS)))
def test_any_reply_can_be_parsed(text: str, name: str) -> None:
    found = dialects.action_of(name, text)
    assert found is None or found.strip()
    inner = text.replace("<", "").replace(">", "").strip()
    if inner and name != "searchqa":
        assert dialects.action_of(name, f"{text}<action>{inner}</action>") == inner


FIELDS = ["observation", "reward", "done", "state", "error", "info"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda c: st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), c, max_size=5),
    ),
    st.sampled_from(BOTH),
    st.sampled_from(["reset", "step"]),
)
def test_a_malformed_answer_is_a_protocol_error(answer: object, which: tuple[str, str], kind: str) -> None:
    name, dialect = which
    dialects.failure(answer)
    try:
        found = dialects.reply_of("A" if dialect == "A" else "B", name, answer, kind)
        assert isinstance(found.observation, str)
        assert 0 <= dialects.outcome_of(name, found.reward) <= 1
    except dialects.ProtocolError as error:
        assert str(error)
