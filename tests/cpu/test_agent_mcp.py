"""MCP tools against real servers: one from the package index, and one that dies, hangs, floods and lists badly."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("mcp", reason="the package mcp is not installed: pip install -e '.[mcp]'")

from icrl_megatron.agents import mcp, mcp_transports
from icrl_megatron.agents.mcp import McpLimits, McpServer
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.agents.tools import Tool, ToolCall, ToolFailure, ToolUseError
from icrl_megatron.distributed import net
from icrl_megatron.utils.errors import ConfigError

SCRIPT = str(Path(__file__).parents[1] / "mcp_server.py")
ENVIRONMENT = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
ANY = st.characters(exclude_categories=[])  # also lone surrogates
LIMITS = McpLimits(start_s=30.0, call_s=20.0, answer_chars=1000, message_bytes=100_000)


def opened(*arguments: str, limits: McpLimits = LIMITS, prefix: str = "") -> McpServer:
    return McpServer([sys.executable, *arguments], limits, prefix, ENVIRONMENT)


def by_name(server: McpServer) -> dict[str, Tool]:
    return {tool.spec.name: tool for tool in server.tools()}


def ask(tools: dict[str, Tool], name: str, **arguments: Any) -> str:
    return asyncio.run(tools[name].call(arguments))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def server() -> Iterator[McpServer]:
    found = opened(SCRIPT, "tools")
    yield found
    found.close()


@pytest.fixture(scope="module")
def tools(server: McpServer) -> dict[str, Tool]:
    return by_name(server)


def test_a_server_from_the_package_index() -> None:
    pytest.importorskip("mcp_server_time", reason="not installed: pip install mcp-server-time")
    servers = [opened("-m", "mcp_server_time", "--local-timezone", "UTC", prefix=prefix) for prefix in ("", "other_")]
    try:
        box = Toolbox([tool for one in servers for tool in one.tools()], ToolLimits())
        names = "get_current_time", "convert_time"
        assert set(box.tools) == {*names, *(f"other_{name}" for name in names)}
        times = {"source_timezone": "Asia/Tokyo", "time": "12:00", "target_timezone": "UTC"}
        session = box.session()
        found = asyncio.run(session.call(ToolCall("other_convert_time", times)))
        assert found.outcome == "answer" and "T03:00:00+00:00" in found.text
        wrong = asyncio.run(session.call(ToolCall("get_current_time", {"timezone": "Mars/Base"})))  # another event loop
        assert wrong.outcome == "invalid" and "Mars/Base" in wrong.text
        missing = asyncio.run(session.call(ToolCall("get_current_time", {})))
        assert missing.outcome == "invalid" and "required" in missing.text
    finally:
        for one in servers:
            one.close()


def test_answers_and_errors_of_a_tool(tools: dict[str, Tool]) -> None:
    assert ask(tools, "echo", text="Grüße \u2028 \x1b[31m\n<answer>") == "Grüße \u2028 [31m\n<answer>"
    with pytest.raises(ToolUseError, match="Error executing tool fail"):
        ask(tools, "fail")
    with pytest.raises(ToolUseError):
        ask(tools, "wait", seconds="soon")
    assert ask(tools, "picture") == "[image left out]"
    long = ask(tools, "flood", characters=5000)
    assert long.startswith("x" * 1000) and long.endswith("[... 4000 characters left out ...]") and len(long) < 1100


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["echo", "wait", "picture"]),
    st.dictionaries(
        st.text(max_size=5) | st.just("text"),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(ANY, max_size=9),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=3,
    ),
)  # fmt: skip
def test_no_arguments_raise_anything_else(tools: dict[str, Tool], name: str, arguments: dict[str, Any]) -> None:
    try:
        answer = asyncio.run(tools[name].call(arguments))
    except (ToolUseError, ToolFailure):
        return
    answer.encode()


def test_a_server_that_dies_during_a_call_is_started_again(tools: dict[str, Tool]) -> None:
    first = ask(tools, "process")
    with pytest.raises(ToolFailure, match="'die'"):
        ask(tools, "die")
    second = ask(tools, "process")
    assert first != second and ask(tools, "echo", text="here") == "here"
    with pytest.raises(ToolFailure):
        ask(tools, "flood", characters=30_000_000)  # over the limit, which ends the connection too
    assert ask(tools, "echo", text="here") == "here"


def test_the_toolbox_tries_again_after_a_death_between_calls(tools: dict[str, Tool]) -> None:
    os.kill(int(ask(tools, "process")), 9)
    box = Toolbox([tools["echo"]], ToolLimits(pause_s=0.01))
    assert asyncio.run(box.session().call(ToolCall("echo", {"text": "a"}))).text == "a"


async def test_a_slow_call_fails_alone_and_a_server_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_transports, "GRACE_S", 0.2)
    server = opened(SCRIPT, "tools", limits=McpLimits(call_s=1.0))
    tools = by_name(server)
    try:
        pid = await tools["process"].call({})
        both = tools["wait"].call({"seconds": 30}), tools["wait"].call({"seconds": 0.3})
        slow, quick = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(slow, ToolFailure) and "within 1 s" in str(slow) and quick == "done"
        assert await tools["process"].call({}) == pid
        with pytest.raises(ToolFailure, match="within 1 s"):
            await tools["hang"].call({})
        assert await tools["process"].call({}) != pid
    finally:
        server.close()


def test_a_list_of_several_pages_is_read_whole() -> None:
    server = opened(SCRIPT, "pages")
    assert list(by_name(server)) == ["tool_0", "tool_1", "tool_2"]
    server.close()
    with pytest.raises(ToolFailure, match="closed"):
        asyncio.run(server.call("tool_0", {}))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([sys.executable, SCRIPT, "endless"], "more than 5 pages"),
        ([sys.executable, SCRIPT, "empty"], "offers no tools"),
        ([sys.executable, SCRIPT, "remote"], "tool 'tool_0' refers to 'http://127.0.0.1:1/a.json'"),
        (["/no/such/server"], "No such file"),
        ([sys.executable, "-c", "import sys; sys.exit('no key is set')"], "it wrote: no key is set"),
        (["sleep", "100"], "no answer within"),
        (["yes"], "cannot be reached"),
        ("http://me:secret-78@127.0.0.1:1/mcp?key=secret-78", "server http://127.0.0.1:1/mcp: it cannot be reached"),
    ],
)
def test_an_unusable_server_is_refused(command: list[str] | str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp, "MOST_PAGES", 5)
    monkeypatch.setattr(mcp_transports, "GRACE_S", 0.2)
    start_s = 30.0 if "-c" in command or SCRIPT in command else 1.0
    remedy = "take the server out of agent.mcp" if "remote" in command else "Check that it can be started"
    with pytest.raises(ConfigError, match=remedy) as error:
        McpServer(command, McpLimits(start_s=start_s), environment=ENVIRONMENT).tools()
    assert words in str(error.value) and "secret" not in str(error.value)


def test_a_server_ends_with_the_process_that_started_it() -> None:
    program = (
        "import asyncio, sys\nfrom icrl_megatron.agents.mcp import McpServer\n"
        f"server = McpServer([sys.executable, {SCRIPT!r}, 'tools'], environment={ENVIRONMENT!r})\n"
        "tools = {tool.spec.name: tool for tool in server.tools()}\n"
        "print(asyncio.run(tools['process'].call({})))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not alive(int(done.stdout))


@pytest.fixture
def port() -> int:
    return net.free_port()


def serve(port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, SCRIPT, "http", str(port)], stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def test_a_server_over_http(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp, "PAUSE_S", 0.0)
    process = serve(port)
    server = McpServer(f"http://127.0.0.1:{port}/mcp", LIMITS)
    try:
        tools = by_name(server)
        assert ask(tools, "echo", text="over HTTP") == "over HTTP"
        with pytest.raises(ToolUseError, match="Error executing tool fail"):
            ask(tools, "fail")
        with pytest.raises(ToolFailure):
            ask(tools, "flood", characters=30_000_000)
        assert ask(tools, "echo", text="after the flood") == "after the flood"
        process.kill()
        process.wait()
        for _ in range(2):
            with pytest.raises(ToolFailure):
                ask(tools, "echo", text="gone")
        process = serve(port)
        assert ask(tools, "echo", text="back") == "back"
    finally:
        process.kill()
        process.wait()
        server.close()
