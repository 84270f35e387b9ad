"""Published environments of the real OpenEnv behind their servers, and servers that fail."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from attempts import observed
from local_servers import serving
from package_environments import PYTHON, SCENARIO, criticised, needs_packages
from whole_runs import icrl

from icrl_megatron.distributed import net
from icrl_megatron.settings.task_options import OpenEnvSource
from icrl_megatron.settings.task_sections import OpenEnvData, StepReward
from icrl_megatron.tasks import openenv_env, registry
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure
from icrl_megatron.tasks.openenv_env import OpenEnvEnvironment, OpenEnvTasks
from icrl_megatron.tasks.reply_forms import ActionForm, last_object
from icrl_megatron.utils.errors import ConfigError

START_S = 150.0

# Environments of our own: tools over MCP, and one that ignores the seed and has one session.
OWN = '''
import random
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State


class Adder(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        tools = FastMCP("adder")

        @tools.tool()
        def add(a: int, b: int) -> int:
            """Adds."""
            return a + b

        super().__init__(tools)

    def reset(self, seed=None, episode_id=None, **kwargs):
        return Observation(metadata={"asked": "?"})

    def _step_impl(self, action, timeout_s=None, **kwargs):
        raise ValueError("no such action")

    @property
    def state(self):
        return State()


class Dice(Environment):
    def reset(self, seed=None, episode_id=None, **kwargs):
        return Words(text=str(random.random()))

    def step(self, action, timeout_s=None, **kwargs):
        raise RuntimeError("the dice are lost")

    @property
    def state(self):
        return State()


class Say(Action):
    word: str


class Words(Observation):
    text: str = ""


adder = create_app(Adder, CallToolAction, CallToolObservation, env_name="adder", max_concurrent_envs=8)
dice = create_app(Dice, Say, Words, env_name="dice", max_concurrent_envs=1)
'''

ASKED = "<context>\nDrug A stops growth.\n</context>\n<question>\nWhat does it do?\n</question>"
EXAMPLE = {"messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "It stops growth."}]}


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@dataclass(frozen=True)
class Servers:
    """Addresses and processes of servers, by name."""

    urls: dict[str, str]
    processes: dict[str, int]

    def __getitem__(self, name: str) -> str:
        return self.urls[name]


APPS = {
    "echo": "echo_env.server.app:app",  # made by `openenv init`
    "safety": "med_safety_gym.app:app",  # openenv-dipg-safety
    "fruit": "fruit_env.server.app:app",  # exported by korrel
    "adder": "own:adder",
    "dice": "own:dice",
    "mortal": "own:dice",
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("openenv")
    (folder / "scenario.py").write_text(SCENARIO)
    (folder / "own.py").write_text(OWN)
    (folder / "rows.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    ports = {name: net.free_port("127.0.0.1") for name in APPS}
    words = [f"{name}={app}:{ports[name]}" for name, app in APPS.items()]
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    env = {**os.environ, "DIPG_DATASET_PATH": str(folder / "rows.jsonl")}
    script = Path(__file__).parents[1] / "openenv_servers.py"
    with (folder / "log").open("w") as log:
        output = {"stdout": log, "stderr": log, "start_new_session": True}
        main = subprocess.Popen([PYTHON, script, *words], cwd=folder, env=env, **output)
    try:
        deadline = time.monotonic() + START_S
        while not all(map(answers, urls.values())):
            said = (folder / "log").read_text()[-2000:]
            assert main.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
        yield Servers(urls, json.loads((folder / "processes.json").read_text()))
    finally:
        os.killpg(main.pid, signal.SIGKILL)
        main.wait(timeout=30)


def tasks(*urls: str, reward: StepReward | None = None, **data: Any) -> OpenEnvTasks:
    given = {"train": ["0:3"], "heldout": ["3:4"], "request_timeout_s": 20.0} | data
    chosen = OpenEnvData(servers=list(urls), **given)
    found = registry.of_source(OpenEnvSource("openenv", data=chosen, reward=reward or StepReward()))
    assert isinstance(found, OpenEnvTasks)
    return found


def first(task_set: OpenEnvTasks) -> OpenEnvEnvironment:
    return task_set.environment(task_set.problems("train")[0])


def play(task_set: OpenEnvTasks, *replies: str) -> tuple[list[str], OpenEnvEnvironment]:
    """The observations of two attempts that are the same, and the environment after them."""
    environment = first(task_set)

    async def rounds() -> list[str]:
        seen = await observed(environment, *replies)
        assert await observed(environment, *replies) == seen
        await environment.close()
        return seen

    return asyncio.run(rounds()), environment


@needs_packages
def test_echo_of_openenv_init(servers: Servers) -> None:
    task_set = tasks(servers["echo"], fields=["echoed_message"])
    task_set.check()
    seen, environment = play(task_set, "hi", " hello ")
    assert seen == ["Echo Env environment ready!", "hi", "hello"]
    assert environment.outcome() == pytest.approx(0.7) and not environment.success()
    assert environment.summary() == "The reward is 0.7 after 2 turns, and the best is 1."
    last = tasks(servers["echo"], reward=StepReward(of="last", low=-1.0, success=0.7))
    seen, environment = play(last, "hi", "hello")
    assert seen[1] == "echoed_message: hi\nmessage_length: 2"
    assert environment.outcome() == pytest.approx(0.75) and environment.success()
    with pytest.raises(BadAnswer, match=r"gave the reward 1\.2, which is not a number in \[0, 1\]"):
        play(task_set, "hi", "hello jack")


@needs_packages
def test_safety_questions_with_rewards_of_other_ranges(servers: Servers) -> None:
    task_set = tasks(servers["safety"], fields=["context", "question"], reward=StepReward(low=-100.0, high=100.0))
    seen, environment = play(task_set, "It stops growth.")
    assert seen[0] == "context: Drug A stops growth.\nquestion: What does it do?"
    # Its server takes the words without their format for a mismatch: -50 and more, of 100.
    assert environment.outcome() < 0.5


@needs_packages
def test_actions_with_several_fields(servers: Servers) -> None:
    call = json.dumps({"tool_calls": [{"id": "1", "name": "price", "arguments": '{"fruit": "pear"}'}]})
    replies = ["I ask.", f"I ask. {call}", '{"content": 3}', 'Then: {"content": "3 dollars"}']
    seen, environment = play(tasks(servers["fruit"]), *replies)
    assert "You sell fruit." in seen[0] and '"tool_calls"' in seen[0] and "metadata" not in seen[0]
    assert seen[1].startswith("There is no JSON object in the reply. Reply with your reasoning")
    assert '"content": "3 dollars"' in seen[2] and seen[3].startswith("The JSON object is not valid: content: 3 is")
    assert environment.success() and len(seen) == 5


@needs_packages
def test_tools_over_mcp(servers: Servers) -> None:
    def call(**arguments: Any) -> str:
        return f"<tool_call>{json.dumps({'name': 'add', 'arguments': arguments})}</tool_call>"

    seen, environment = play(tasks(servers["adder"]), call(a=2, b=3), call(a="x"), f"{call()}{call()}", "It is 5.")
    assert '"name": "add"' in seen[0] and "A reply without a call is your answer." in seen[0]
    assert "5" in seen[1] and "error" in seen[2] and seen[3].startswith("There are several calls in one reply")
    assert seen[4] == "" and environment.outcome() == 0.0


@needs_packages
def test_a_critique_between_two_attempts(servers: Servers, tmp_path: Path) -> None:
    task_set = tasks(servers["echo"], max_turns=1)
    episode = criticised(task_set, tmp_path, ["hi"], "Write ten letters.", ["0123456789"])
    assert [attempt.outcome for attempt in episode.attempts] == [pytest.approx(0.2), 1.0]
    assert episode.attempts[0].summary == "The reward is 0.2 after 1 turns, and the best is 1."


@needs_packages
def test_an_environment_that_ignores_the_seed_is_refused(servers: Servers) -> None:
    with pytest.raises(ConfigError, match=r"two resets with .* gave different problems"):
        tasks(servers["dice"]).check()
    with pytest.raises(EnvironmentFailure, match="answered a step with EXECUTION_ERROR: the dice are lost"):
        play(tasks(servers["dice"], fields=["nothing"]), "roll")


@needs_packages
async def test_a_session_is_free_when_its_episode_is_over(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openenv_env, "BACKOFF_S", 0.05)
    task_set = tasks(servers["dice"])
    environment = first(task_set)
    await environment.reset()
    with pytest.raises(EnvironmentFailure, match=r"CAPACITY_REACHED.*raise the server's max_concurrent_envs"):
        await first(task_set).reset()
    del environment
    gc.collect()
    await asyncio.sleep(0)
    await first(task_set).reset()


@needs_packages
def test_a_server_that_dies_fails_its_episodes_and_the_check(servers: Servers) -> None:
    task_set = tasks(servers["mortal"])

    async def episode() -> None:
        environment = first(task_set)
        await environment.reset()
        os.kill(servers.processes["mortal"], signal.SIGKILL)
        with pytest.raises(EnvironmentFailure, match=r"closed the connection during a step|broke off"):
            await environment.step("roll")

    asyncio.run(episode())  # check() has an event loop of its own
    with pytest.raises(ConfigError, match="/ws cannot be opened"):
        task_set.check()


SCHEMA = {"action": {"title": "Say", "properties": {"word": {"type": "string"}}, "required": ["word"]}}
READY = {"type": "observation", "data": {"observation": {"text": "ready"}, "reward": None, "done": False}}


def answer(value: object) -> str:
    return json.dumps({"type": "observation", "data": value})


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("nothing", "is it a server of OpenEnv"),
        ("[1]", "is it a server of OpenEnv"),
        (answer([1]), "is it a server of OpenEnv"),
        (answer({"observation": {}, "done": "no", "reward": 0.0}), "is it a server of OpenEnv"),
        (answer({"observation": {}, "done": True, "reward": "1"}), "is it a server of OpenEnv"),
        (answer({"observation": 1, "done": True, "reward": 1.0}), "has no observation"),
        (answer({"observation": {}, "done": True, "reward": 1e400}), "gave the reward inf"),
        ("x" * 5000, "more than rollout.max_observation_bytes"),
        ("", r"did not answer a step within 0\.5 s"),
    ],
)
async def test_answers_of_broken_servers_fail_the_episode(said: str, message: str) -> None:
    async def socket(request: web.Request) -> web.WebSocketResponse:
        reply = web.WebSocketResponse()
        await reply.prepare(request)
        await reply.receive()
        await reply.send_str(json.dumps(READY))
        await reply.receive()
        if said:
            await reply.send_str(said)
        await reply.receive()
        return reply

    async def schema(request: web.Request) -> web.Response:
        return web.json_response(SCHEMA)

    async with serving(web.get("/ws", socket), web.get("/schema", schema)) as url:
        source = tasks(url, request_timeout_s=0.5)._source
        environment = first(OpenEnvTasks(source, 4096))
        assert await environment.reset() == "ready"
        with pytest.raises(EnvironmentFailure, match=message):
            await environment.step("roll")
        assert environment.outcome() == 0.0
        await environment.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.jsonl", "neither a range of seeds like 0:900 nor a file"),
        ("{", "a line is not JSON"),
        ("[1]", "each row must be an object"),
        ("", "each row must be an object"),
    ],
)
def test_problems_that_cannot_be_read_are_refused(tmp_path: Path, text: str, message: str) -> None:
    given = text
    if not text.startswith("nowhere"):
        (tmp_path / "rows.jsonl").write_text(text)
        given = str(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match=message):
        tasks("http://host:1", train=[given]).problems("train")


def test_rows_are_arguments_of_reset(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"task": "easy"}\n\n{"seed": 7}\n')
    task_set = tasks("http://host:1", train=[str(tmp_path / "rows.jsonl"), "3:4"], reset={"task": "hard", "size": 2})
    found = [task_set.environment(task)._arguments for task in task_set.problems("train")]
    assert found == [
        {"task": "easy", "size": 2},
        {"task": "hard", "size": 2, "seed": 7},
        {"task": "hard", "size": 2, "seed": 3},
    ]


AWAY = "http://127.0.0.1:1/n"


def test_the_last_object_of_a_reply_counts() -> None:
    assert last_object('{"a": 1} or {"a": {"b": 2}} }') == {"a": {"b": 2}} and last_object("{no") is None
    begun = time.monotonic()
    last_object("{" * 500_000)
    assert time.monotonic() - begun < 5.0
    form = ActionForm.of_schema({"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}})
    assert form.problem("{}") == "The JSON object is not valid: 'n' is a required property."
    assert form.problem('{"n": 2}') == "" and form.action('{"n": 2}') == {"n": 2}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"n": {"$ref": AWAY}}}, f"refers to '{AWAY}', which is not a part"),
        ({"properties": {"n": {"type": "number or so"}}}, "is not a JSON schema"),
        ({"properties": {"n": {"$ref": "#/properties/n"}}}, "refers to itself without end"),
    ],
)
def test_schemas_of_servers_are_not_trusted(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        ActionForm.of_schema({"type": "object", **schema})


def test_a_server_that_is_down_ends_the_command_before_a_model_is_loaded(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{net.free_port('127.0.0.1')}"
    data = f"{{train: ['0:4'], heldout: ['4:6'], servers: ['{url}'], request_timeout_s: 5}}"
    words = ("tasks.sources.0.name=openenv", f"tasks.sources.0.data={data}", "model.path=/nowhere")
    code, _, error = icrl("train", "any_text", f"run_dir={tmp_path}", *words, "--dry-run")
    assert code == 2 and "/ws cannot be opened" in " ".join(error.split()), error
