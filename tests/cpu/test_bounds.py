"""Answers of real servers and processes that are too long, compressed, endless, slow or malformed: no more than the
limit is read, and the request fails."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_servers import Handler, threaded

from icrl_megatron.engines import sglang_server
from icrl_megatron.engines.protocol import NoAnswerError, RequestFailedError
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.external import ExternalSpeaker, first_model
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.speakers import Ask
from icrl_megatron.settings.endpoint import Endpoint
from icrl_megatron.settings.rollout_schema import RolloutSettings
from icrl_megatron.settings.task_options import ServedSource
from icrl_megatron.settings.task_sections import ServerData
from icrl_megatron.tasks import agentgym_dialects as dialects
from icrl_megatron.tasks import env_check, servers
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.agentgym_dialects import ProtocolError
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure
from icrl_megatron.tasks.episode_process import EpisodeProcess
from icrl_megatron.tasks.grader import Worker
from icrl_megatron.tasks.retrieval import RemoteRetriever
from icrl_megatron.utils.connections import Connections
from icrl_megatron.utils.errors import ConfigError

MIB = 1 << 20
LIMIT = MIB // 4
GOOD = json.dumps({"result": [[{"contents": "a passage"}]]}).encode()
LONG = json.dumps({"result": [[{"contents": "x" * (12 * MIB)}]]}).encode()

Sends = Callable[["Sender"], None]


class Sender(Handler):
    """Answers every request with the output of `sends`, and counts the bytes that were sent."""

    sends: Sends
    sent: list[int]

    def do_GET(self) -> None:
        self.body()
        with contextlib.suppress(OSError):  # the client has closed the connection
            type(self).sends(self)
        self.close_connection = True

    do_POST = do_GET

    def begin(self, length: int | None = None, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def put(self, content: bytes) -> None:
        self.wfile.write(content)
        self.sent[0] += len(content)


def whole(content: bytes, **headers: str) -> Sends:
    def send(handler: Sender) -> None:
        handler.begin(len(content), **headers)
        for start in range(0, len(content), 1 << 16):
            handler.put(content[start : start + (1 << 16)])

    return send


def endless(handler: Sender) -> None:
    handler.begin()
    while True:
        handler.put(b" " * (1 << 16))


def trickles(handler: Sender) -> None:
    handler.begin()
    while True:
        handler.put(b" ")
        time.sleep(0.02)


@contextmanager
def serving(sends: Sends) -> Iterator[tuple[str, list[int]]]:
    """(address, [bytes sent])."""
    sent = [0]
    with threaded(Sender, sends=staticmethod(sends), sent=sent) as url:
        yield url, sent


pytestmark = pytest.mark.usefixtures("fast")


def search(sends: Sends, timeout_s: float = 20.0, limit: int = LIMIT) -> tuple[list[str] | EnvironmentFailure, int]:
    """(the result of a search with this answer, the number of bytes sent)."""
    with serving(sends) as (url, sent):
        try:
            return asyncio.run(RemoteRetriever([url], timeout_s, limit).search("words", 3)), sent[0]
        except EnvironmentFailure as failure:
            return failure, sent[0]


BOMB = zlib.compress(b" " * (64 * MIB), 9)
DEEP = b'{"result": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
RAW = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)


@pytest.mark.parametrize(
    "sends",
    [
        whole(LONG),
        endless,
        whole(gzip.compress(b" " * (64 * MIB), mtime=0), Content_Encoding="gzip"),
        whole(BOMB, Content_Encoding="deflate"),
    ],
    ids=["long", "endless", "gzip", "deflate"],
)
def test_no_more_than_the_limit_is_read(sends: Sends) -> None:
    tracemalloc.start()
    found, sent = search(sends)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(found, BadAnswer)
    assert f"answered more than rollout.max_observation_bytes = {LIMIT} bytes" in str(found)
    assert sent < 10 * MIB  # the limit and the kernel's buffers
    assert peak < 16 * MIB


def test_an_answer_of_exactly_the_limit_is_read() -> None:
    content = GOOD + b" " * (LIMIT - len(GOOD))
    assert search(whole(content))[0] == ["a passage"]
    assert isinstance(search(whole(content + b" "))[0], BadAnswer)
    assert search(whole(content + b" "), limit=LIMIT + 1)[0] == ["a passage"]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (gzip.compress(GOOD, mtime=0), "gzip"),
        (gzip.compress(GOOD, mtime=0), "X-GZIP"),
        (zlib.compress(GOOD), "deflate"),
        (RAW.compress(GOOD) + RAW.flush(), "deflate"),
        (GOOD, "identity"),
    ],
)
def test_compressed_answers_are_read(content: bytes, encoding: str) -> None:
    assert search(whole(content, Content_Encoding=encoding))[0] == ["a passage"]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (gzip.compress(GOOD, mtime=0)[:-9], "gzip"),
        (b"nonsense", "gzip"),
        (b"nonsense", "deflate"),
        (GOOD, "br"),
        (GOOD, "zstd"),
    ],
)
def test_damaged_or_unknown_compression_is_a_failure(content: bytes, encoding: str) -> None:
    found, _ = search(whole(content, Content_Encoding=encoding))
    assert isinstance(found, EnvironmentFailure) and "broke off" in str(found)


def test_an_answer_that_never_ends_fails_after_the_time_limit() -> None:
    begun = time.monotonic()
    found, _ = search(trickles, timeout_s=0.3)
    assert isinstance(found, EnvironmentFailure) and "did not answer within 0.3 s" in str(found)
    assert time.monotonic() - begun < servers.TRIES * 0.3 + 5


@pytest.mark.parametrize("content", [DEEP, b"\xff\xfe", b'{"result": 1' + b"0" * 5000 + b"}", b"", b"null", b"NaN"])
def test_a_malformed_answer_is_a_failure(content: bytes) -> None:
    assert isinstance(search(whole(content), limit=MIB)[0], EnvironmentFailure)


def gym(name: str, url: str, limit: int = LIMIT) -> AgentGym:
    return AgentGym(ServedSource(name, data=ServerData(train=["0:2"], heldout=["2:3"], servers=[url])), limit)


def test_a_long_answer_of_an_environment_server_names_the_setting() -> None:
    with serving(whole(LONG)) as (url, _):
        task_set = gym("textcraft", url)
        with pytest.raises(BadAnswer, match=rf"max_observation_bytes = {LIMIT}"):
            asyncio.run(task_set.environment(task_set.problems("train")[0]).reset())
        with pytest.raises(ConfigError, match="max_observation_bytes"):
            task_set.check()


def test_endless_answers_to_the_checks_of_servers_are_refused() -> None:
    with serving(endless) as (url, _):
        with pytest.raises(ConfigError, match="answers, but not as textcraft"):
            env_check.check(url, "textcraft", 0, 10.0)
        with pytest.raises(ConfigError, match="no OpenAI-compatible endpoint there"):
            first_model(Endpoint(url=url))


@pytest.mark.parametrize(
    "answer",
    [
        {"observation": "x", "reward": float("nan"), "done": False},
        {"observation": "x", "reward": 10**400, "done": False},
        {"observation": "x", "reward": True, "done": False},
        {"observation": "x", "reward": 0, "done": "false"},
        {"observation": ["x"], "reward": 0, "done": False},
        {"observation": None, "reward": 0, "done": False},
    ],
)
def test_answers_with_wrong_types_are_protocol_errors(answer: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        dialects.reply_of("A", "textcraft", answer, "step")


@pytest.mark.parametrize("actions", [3, "look", {"look": 1}, [["look"]], [None]])
def test_available_actions_that_are_not_a_list_of_texts_are_ignored(actions: object) -> None:
    answer = {"observation": "x", "reward": 0, "done": False, "available_actions": actions}
    assert dialects.reply_of("A", "alfworld", answer, "step").actions == ()


async def test_two_episodes_never_share_an_environment() -> None:
    """The server answers every /create with the same id."""
    answer = json.dumps({"id": 0, "observation": "go", "reward": 0, "done": False}).encode()
    with serving(lambda handler: whole(b"{}" if handler.path == "/close" else answer)(handler)) as (url, _):
        task_set = gym("babyai", url)
        first, second = (task_set.environment(task) for task in task_set.problems("train"))
        await first.reset()
        with pytest.raises(EnvironmentFailure, match="another episode still plays there"):
            await second.reset()
        del first
        await second.reset()


# External models, engines and worker processes


PROMPTER = Prompter(build_tokenizer(["up", *template_words("compact")]), RolloutSettings(templates="compact"))


def critic(sends: Sends) -> Any:
    with serving(sends) as (url, _):
        speaker = ExternalSpeaker(Endpoint(url=url, model="m"), 1.0, PROMPTER, Connections(1))
        return asyncio.run(speaker.reply(Ask("critique", (1,), 8, 0, "", None, "words")))


def said(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def test_a_long_critique_is_cut_at_its_token_limit_and_a_longer_one_fails_its_request() -> None:
    completion = critic(whole(said("up " * 300_000)))
    assert (len(completion.ids), completion.finish_reason) == (8, "length")
    assert critic(whole(said("up up"))).finish_reason == "stop"
    for sends in (whole(said("up " * (4 * MIB))), endless):
        with pytest.raises(RequestFailedError, match="the answer has more than"):
            critic(sends)


@pytest.mark.parametrize(("sends", "timeout_s"), [(endless, 60.0), (trickles, 0.3)], ids=["endless", "trickles"])
def test_an_engine_servers_answers_are_limited(sends: Sends, timeout_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_server, "_ANSWER_BYTES", MIB)
    begun = time.monotonic()
    with serving(sends) as (url, sent), pytest.raises(NoAnswerError):
        Server(None, url).post("/flush_cache", {}, timeout_s)
    assert sent[0] < 10 * MIB and time.monotonic() - begun < 20


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a module whose process prints "ready" and then, for each line, the value of an expression."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def make(expression: str) -> str:
        code = f"import sys\nprint('ready', flush=True)\nfor line in sys.stdin:\n    print({expression}, flush=True)\n"
        (tmp_path / "odd_worker.py").write_text(code)
        return "odd_worker"

    return make


@pytest.mark.parametrize("expression", ["'x' * (2 << 20)", "'no json'", "'[1]'", "'[' * 100_000", "'1' * 5000"])
def test_a_worker_with_a_long_or_malformed_answer_is_ended(worker: Callable[[str], str], expression: str) -> None:
    made, long = Worker(worker(expression), LIMIT), "<<" in expression
    with pytest.raises(ValueError if long else EOFError, match=f"more than {LIMIT} bytes" if long else None):
        made.ask({}, 20.0)
    assert made._process.returncode is not None


def test_a_long_answer_of_a_game_names_the_setting(worker: Callable[[str], str]) -> None:
    process = EpisodeProcess(lambda: Worker(worker("'x' * (2 << 20)"), LIMIT), "a game", 20.0, LIMIT)
    with pytest.raises(EnvironmentFailure, match=f"max_observation_bytes = {LIMIT}"):
        asyncio.run(process.ask({"do": "step"}))
    process.close()
