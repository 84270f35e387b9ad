"""The cache of tools' answers: what is stored, expiry, several processes, kills, and replays."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from attempts import observed
from local_servers import Handler, threaded

from icrl_megatron.agents.cache import MOST_ENTRY_BYTES, ToolCache, check
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits, ToolSession
from icrl_megatron.agents.tools import ToolCall, ToolFailure, ToolSpec, ToolUseError
from icrl_megatron.settings.task_options import ArchiveSource, SearchQASource
from icrl_megatron.settings.task_schema import ToolCacheSettings
from icrl_megatron.settings.task_sections import SearchAgent, SearchData
from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.tasks.registry import Catalogue
from icrl_megatron.types import Task

TEXT = {"type": "object", "properties": {"text": {"type": "string"}}}


class Counter:
    """Answers with the number of its calls; "no" is the model's mistake, and "down" a failure."""

    def __init__(self, version: str = "1") -> None:
        self.spec, self.calls = ToolSpec("count", "Counts.", TEXT, version), 0

    async def call(self, arguments: Any) -> str:
        self.calls += 1
        if arguments["text"] == "no":
            raise ToolUseError("no")
        if arguments["text"] == "down":
            raise ToolFailure("the line is down")
        return f"call {self.calls}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tools.sqlite"


@pytest.fixture
def opened() -> Iterator[list[ToolCache]]:
    caches: list[ToolCache] = []
    yield caches
    for cache in caches:
        cache.close()


Opened = list[ToolCache]


def open_cache(opened: Opened, path: Path, mode: str = "read_write", **more: Any) -> ToolCache:
    opened.append(ToolCache(ToolCacheSettings(mode, str(path), **more)))
    return opened[-1]


def session(tool: Counter, cache: ToolCache) -> ToolSession:
    return Toolbox([tool], ToolLimits(call_s=30.0, tries=1), cache).session()


def ask(asked: ToolSession, text: str) -> str:
    return asyncio.run(asked.call(ToolCall("count", {"text": text}))).text


def rows(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT tool, version, arguments, answer FROM answers ORDER BY arguments").fetchall()


def stored(path: Path, count: int) -> None:
    """Waits until that many answers are stored."""
    deadline = time.monotonic() + 20
    while len(rows(path)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_another_episode_gets_the_stored_answer(path: Path, opened: Opened) -> None:
    tool, cache = Counter(), open_cache(opened, path)
    first = session(tool, cache)
    assert ask(first, "a") == "call 1" and first.cached == 0
    stored(path, 1)
    second = session(tool, cache)
    assert [ask(second, "a"), ask(second, "a"), ask(second, "b")] == ["call 1", "call 1", "call 2"]
    assert second.cached == 1 and tool.calls == 2  # the repeated call was answered by the episode's own history
    assert second.counts == {("count", "answer"): 2, ("count", "repeat"): 1}
    assert rows(path)[0] == ("count", "1", '{"text": "a"}', "call 1")


def test_another_version_has_other_answers_and_none_is_not_cached(path: Path, opened: Opened) -> None:
    cache = open_cache(opened, path)
    for version, calls in (("1", 1), ("2", 1), ("", 2)):
        tool = Counter(version)
        for _ in range(2):
            ask(session(tool, cache), "a")
            cache._writer.submit(int).result()  # after the write
        assert tool.calls == calls
    assert [row[1] for row in rows(path)] == ["1", "2"]


def test_failures_are_never_stored_and_no_error_answers_a_call(path: Path, opened: Opened) -> None:
    tool, cache = Counter(), open_cache(opened, path)
    for _ in range(2):
        assert ask(session(tool, cache), "no") == "no"
        with pytest.raises(ToolFailure, match="the line is down"):
            ask(session(tool, cache), "down")
        cache._writer.submit(int).result()
    assert tool.calls == 4 and [row[2] for row in rows(path)] == ['{"text": "no"}']


def test_a_mistake_is_recorded_for_replays_and_gives_way_to_an_answer(path: Path, opened: Opened) -> None:
    tool, cache = Counter(), open_cache(opened, path)
    assert ask(session(tool, cache), "no") == "no"
    stored(path, 1)
    replayed = session(tool, open_cache(opened, path, "replay"))
    assert ask(replayed, "no") == "no" and replayed.counts == {("count", "invalid"): 1} and tool.calls == 1
    entry = ("count", "1", '{"text": "no"}')
    for text, mistake in (("yes", False), ("no", True)):
        cache.put(entry, text, mistake)
        cache._writer.submit(int).result()
        assert asyncio.run(cache.get(entry)) == "yes"


def test_expired_answers_are_asked_for_again_and_replaced(path: Path, opened: Opened) -> None:
    tool, cache = Counter(), open_cache(opened, path, expiry_s=0.3)
    assert ask(session(tool, cache), "a") == "call 1"
    stored(path, 1)
    time.sleep(0.35)
    assert ask(session(tool, cache), "a") == "call 2"
    cache.close()
    assert [row[3] for row in rows(path)] == ["call 2"]
    time.sleep(0.35)  # a replay does not depend on the time
    assert ask(session(tool, open_cache(opened, path, "replay", expiry_s=0.3)), "a") == "call 2"


def test_an_answer_that_has_not_expired_is_not_replaced(path: Path, opened: Opened) -> None:
    cache = open_cache(opened, path, expiry_s=60.0)
    for answer in ("first", "second"):
        cache.put(("t", "1", "{}"), answer)
        cache._writer.submit(int).result()
    assert [row[3] for row in rows(path)] == ["first"]


def test_odd_texts_and_large_answers(path: Path, opened: Opened) -> None:
    cache = open_cache(opened, path)
    texts = {"nul": "a\0b", "escape": "\x1b[2J", "half": "\ud83d", "emoji": "\U0001f600", "empty": ""}
    for name, text in texts.items():
        cache.put(("t", "1", json.dumps(text)), text)
        cache.put(("t", "1", name), "x" * MOST_ENTRY_BYTES)  # together with its key too large
    cache._writer.submit(int).result()
    for name, text in texts.items():
        want = text.encode(errors="replace").decode()
        assert asyncio.run(cache.get(("t", "1", json.dumps(text)))) == want
        assert asyncio.run(cache.get(("t", "1", name))) is None


def test_a_full_file_takes_no_more_answers(path: Path, opened: Opened, capfd: pytest.CaptureFixture[str]) -> None:
    cache = open_cache(opened, path, max_mib=1)
    for i in range(40):
        cache.put(("t", "1", str(i)), str(i) * 50_000)
        cache._writer.submit(int).result()
    assert asyncio.run(cache.get(("t", "1", "3"))) == "3" * 50_000
    cache.close()
    assert path.stat().st_size <= 1 << 20 and 8 < len(rows(path)) < 40
    assert capfd.readouterr().err.count("raise tasks.tool_cache.max_mib") == 1


WRITER = """
import sys
from pathlib import Path
from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.settings.task_schema import ToolCacheSettings
name, path, first, count = sys.argv[1:]
cache = ToolCache(ToolCacheSettings("read_write", path))
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(first), int(first) + int(count)):
    cache.put(("t", "1", str(i)), f"{i} " * 200)
    if i % 10 == 0:
        cache._writer.submit(int).result()
"""


def writer(name: str, path: Path, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, name, str(path), str(first), str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_create_and_fill_one_file(path: Path) -> None:
    """Half of what each writes, the other writes too. Neither closes the cache: the end of the process does."""
    both = [writer("one", path, 0, 600), writer("other", path, 300, 600)]
    for process in both:
        begin(process)
    for process in both:
        assert process.communicate(timeout=60) == ("", None) and process.returncode == 0
    check(ToolCacheSettings("replay", str(path)))
    assert {row[2]: row[3] for row in rows(path)} == {str(i): f"{i} " * 200 for i in range(900)}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no write-ahead log or temporary file is left


def test_a_process_that_is_killed_while_it_writes(path: Path, opened: Opened) -> None:
    for turn in range(3):
        process = writer("killed", path, 1_000_000 * turn, 1_000_000)
        begin(process)
        before = len(rows(path))
        stored(path, before + 200)
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        process.communicate()
        check(ToolCacheSettings("replay", str(path)))
        kept = rows(path)
        assert len(kept) >= before + 200 and all(answer == f"{arguments} " * 200 for _, _, arguments, answer in kept)
    cache = open_cache(opened, path)
    cache.put(("t", "1", "after"), "it")
    cache._writer.submit(int).result()
    assert asyncio.run(cache.get(("t", "1", "after"))) == "it"


HOLDER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("ready", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
"""


async def test_another_processs_write_stops_neither_the_event_loop_nor_reads(path: Path, opened: Opened) -> None:
    cache = open_cache(opened, path)
    cache.put(("t", "1", "a"), "kept")
    cache._writer.submit(int).result()
    command = [sys.executable, "-c", HOLDER, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
    until = time.monotonic() + 0.5
    for i in range(10):
        cache.put(("t", "1", str(i)), "new")
    while (began := time.monotonic()) < until:
        assert await cache.get(("t", "1", "a")) == "kept"
        assert time.monotonic() - began < 0.4  # a blocking write would wait all the time
    assert len(rows(path)) == 1
    holder.communicate("\n", timeout=10)
    stored(path, 11)


class Retrieves(Handler):
    asked: list[str]

    def do_POST(self) -> None:
        (query,) = json.loads(self.body())["queries"]
        self.asked.append(query)
        contents = f"about {query}, answer {len(self.asked)}"  # never the same twice
        self.send_json({"result": [[{"document": {"contents": contents}, "score": 1.0}]]})


def test_a_run_is_repeated_without_its_server(tmp_path: Path, path: Path, opened: Opened) -> None:
    for split, answer in (("train", "Paris"), ("heldout", "Rome")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": f"{split}?", "label": answer}) + "\n")
    asked: list[str] = []
    files = {split: [str(tmp_path / f"{split}.jsonl")] for split in ("train", "heldout")}

    def play(cache: ToolCache, url: str, queries: tuple[str, ...]) -> tuple[list[str], dict[str, float]]:
        data = SearchData(**files, servers=[url])
        source = SearchQASource("searchqa", data=data, agent=SearchAgent(format="tags"))
        catalogue = Catalogue([source], tool_cache=cache)
        task: Task = catalogue.get("searchqa").problems("train")[0]
        environment = catalogue.environment(task)
        _, *seen = asyncio.run(observed(environment, *(f"<search>{query}</search>" for query in queries)))
        return seen, environment.measures()  # type: ignore[attr-defined]

    recording = open_cache(opened, path)
    with threaded(Retrieves, asked=asked) as url:
        seen, counts = play(recording, url, ("rivers", "towns"))
    assert seen == ["(1) about rivers, answer 1", "(1) about towns, answer 2"] and counts["calls_cached"] == 0
    recording.close()

    replayed = open_cache(opened, path, "replay")
    seen_again, counts = play(replayed, url, ("rivers", "towns"))
    assert seen_again == seen and counts["calls_cached"] == counts["calls_search"] == 2
    with pytest.raises(EnvironmentFailure, match=r"mode=replay: .*tools\.sqlite has no answer of tool 'search'"):
        play(replayed, url, ("lakes",))
    assert asked == ["rivers", "towns"]


async def test_archives_tools_are_cached_except_the_calculator(path: Path, opened: Opened) -> None:
    pytest.importorskip("bm25s")
    catalogue = Catalogue([ArchiveSource("archive")], tool_cache=open_cache(opened, path))
    task = catalogue.get("archive").problems("train")[0]
    for _ in range(2):
        environment = catalogue.environment(task)
        await environment.reset()
        for action in ("<search>p 4 8 3</search>", "<page>t 0 2 7</page>", "<calculator>1 + 1</calculator>"):
            await environment.step(action)
        opened[0]._writer.submit(int).result()
    assert environment.measures()["calls_cached"] == 2  # type: ignore[attr-defined]
    search = ("search", "archive 1, 1 passages of 2000 characters")
    assert [row[:2] for row in rows(path)] == [search, ("page", "archive 1")]
