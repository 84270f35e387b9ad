"""`icrl serve-search`: the real process, its API compared with the retriever, its limits, and runs that start it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sockets import listeners
from whole_runs import ICRL, icrl

pytest.importorskip("bm25s")

from icrl_megatron.launch import servers
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import serve_search
from icrl_megatron.tasks.retrieval import LocalRetriever, RemoteRetriever
from icrl_megatron.tasks.serve_search import BadRequest, SearchServer, asked
from icrl_megatron.utils.errors import ConfigError

DOCUMENTS = [
    {"contents": "Paris\nParis is the capital of France, on the Seine."},
    {"title": "Rome", "text": "Rome is the capital of Italy."},
    {"contents": "Badger\nBadgers dig burrows."},
]
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    return path


@contextmanager
def started(corpus: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of a server."""
    command = [*ICRL, "serve-search", str(corpus), "--port", "0"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"(http://\S+)/retrieve", line)
        assert found, line
        yield found[1], process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def server(corpus: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with started(corpus) as found:
        yield found


def post(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/retrieve", data), timeout=TIMEOUT_S) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode()
        return error.code, text


def test_answers_equal_those_of_the_retriever(server: tuple[str, subprocess.Popen[str]], corpus: Path) -> None:
    remote, local = RemoteRetriever([server[0]], 10.0), LocalRetriever(corpus)
    for query in ("capital", "capital of Italy", "Seine", "zzz", "", "x" * 100_000 + " Rome"):
        expected = asyncio.run(local.search(query[: serve_search.QUERY_CHARS], 2))
        assert asyncio.run(remote.search(query, 2)) == expected
    assert asyncio.run(remote.search("Rome", 1)) == ["Rome\nRome is the capital of Italy."]


def test_search_r1_api(server: tuple[str, subprocess.Popen[str]]) -> None:
    url = server[0]
    status, found = post(url, {"queries": ["capital Italy", "burrows"], "topk": 2, "return_scores": True})
    assert status == 200
    first, second = found["result"]
    assert [one["document"]["contents"].split("\n")[0] for one in first] == ["Rome", "Paris"]
    assert first[0]["score"] > first[1]["score"] > 0
    assert len(second) == 1
    _, plain = post(url, {"queries": ["burrows"], "topk": 2})
    assert plain["result"] == [[second[0]["document"]]]
    with urllib.request.urlopen(url + "/", timeout=TIMEOUT_S) as reply:
        assert json.load(reply) == {"documents": 3}


def test_server_listens_on_loopback_and_ends_on_sigterm(corpus: Path) -> None:
    with started(corpus) as (url, process):
        found = listeners(process.pid)
        assert [one.local for one in found] == [True]
        assert url == f"http://127.0.0.1:{next(iter(found)).port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "not an object"),
        ({}, "queries must be a list of 1 to 64 texts"),
        ({"queries": []}, "queries must be"),
        ({"queries": ["x"] * 65}, "queries must be"),
        ({"queries": "text"}, "queries must be"),
        ({"queries": [1]}, "each query must be a text"),
        ({"queries": ["x"], "topk": 0}, "topk must be 1 to 100"),
        ({"queries": ["x"], "topk": 101}, "topk must be"),
        ({"queries": ["x"], "topk": True}, "topk must be"),
        ({"queries": ["x"], "return_scores": 1}, "return_scores must be"),
    ],
)
def test_bad_requests_are_rejected(body: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        asked(body if isinstance(body, bytes) else json.dumps(body).encode())


def test_server_continues_after_bad_requests(server: tuple[str, subprocess.Popen[str]]) -> None:
    url = server[0]
    assert post(url, {"queries": 3}) == (400, '{"error": "queries must be a list of 1 to 64 texts"}')
    assert post(url, b"x" * (serve_search.BODY_BYTES + 1))[0] == 413
    assert post(url, {"queries": ["Rome"]})[0] == 200


async def test_requests_beyond_the_limit_get_503(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aiohttp.test_utils import TestClient, TestServer

    monkeypatch.setattr(serve_search, "WAITING", 1)
    async with TestClient(TestServer(SearchServer(LocalRetriever(corpus)).app())) as client:

        async def one() -> int:
            async with client.post("/retrieve", json={"queries": ["Rome"]}) as reply:
                return reply.status

        assert set(await asyncio.gather(*(one() for _ in range(8)))) == {200, 503}
        assert await one() == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [(["gone.jsonl"], "gone.jsonl: no such file; give a JSONL of documents"), (["{corpus}", "--port", "1"], "listen")],
)
def test_unusable_corpus_and_port_are_rejected(words: list[str], message: str, corpus: Path) -> None:
    if "--port" in words and os.geteuid() == 0:
        words = [*words, "--host", "192.0.2.1"]  # root may listen on port 1, but not on a foreign address
    code, _, err = icrl("serve-search", *(word.replace("{corpus}", str(corpus)) for word in words))
    assert code == 2
    assert message in err


def served(corpus: Path, count: int = 1) -> Settings:
    command = f"icrl serve-search {corpus} --host {{host}} --port {{port}}"
    source = f"{{name: searchqa, serve: {{command: '{command}', count: {count}}}}}"
    return settings_module.load("rulebook_easy", [f"tasks.sources=[{source}]"])


def test_run_starts_servers_without_an_activated_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One server builds the index of a new corpus while the others wait."""
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with servers.beside(served(new, count=4), tmp_path / "logs") as told:
        (source,) = told.tasks.sources
        assert len(source.data.servers) == 4
        for url in source.data.servers:
            (found,) = asyncio.run(RemoteRetriever([url], 10.0).search("Italy", 1))
            assert found == "Rome\nRome is the capital of Italy."


def test_run_with_a_missing_corpus_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'searchqa': the server .*gone\.jsonl: no such file; give a JSONL"):
        with servers.beside(served(tmp_path / "gone.jsonl"), tmp_path / "logs"):
            pass
