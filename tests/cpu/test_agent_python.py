"""The Python tool: real programs in the real sandbox, and the state of an episode."""

from __future__ import annotations

import asyncio
import functools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sandboxes import sandboxed

from icrl_megatron.agents import python
from icrl_megatron.agents.python import NO_OUTPUT, Python, PythonLimits
from icrl_megatron.agents.text import head, plain, tail
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits, ToolSession
from icrl_megatron.agents.tools import ToolCall, ToolFailure
from icrl_megatron.utils.errors import ConfigError

LIMITS = PythonLimits(cpu_s=1.0, memory_bytes=256 << 20, output_chars=200, error_chars=300)
pytestmark = sandboxed


@pytest.fixture(scope="module")
def stateless() -> Python:
    return Python(LIMITS)


@pytest.fixture(scope="module")
def notebook() -> Python:
    return Python(LIMITS, keeps_state=True)


def episode(tool: Python) -> ToolSession:
    return Toolbox([tool], ToolLimits()).session()


def ask(session: ToolSession, *codes: str) -> list[str]:
    async def run() -> list[str]:
        return [(await session.call(ToolCall("python", {"code": code}))).text for code in codes]

    return asyncio.run(run())


def one(tool: Python, code: str) -> str:
    return asyncio.run(tool.call({"code": code}))


def test_output_and_the_value_of_the_last_expression(stateless: Python) -> None:
    assert one(stateless, "print('a')\n6 * 7") == "a\n42"
    assert one(stateless, "x = 1") == one(stateless, "None") == one(stateless, "") == NO_OUTPUT
    assert one(stateless, "import sys\nsys.exit()") == NO_OUTPUT
    assert one(stateless, "exit('no')") == "SystemExit: no"
    assert one(stateless, "print('\\x1b[1mr\\u00e9sum\\u00e9\\x00')") == "[1mrésumé"
    assert (
        one(stateless, "import os\nprint(1, flush=True)\nos._exit(0)") == "1\nThe program ended before its last line."
    )
    assert "SyntaxError" not in one(stateless, "def f(a: b): ...\nb = 1\nprint(__name__)")
    assert "NameError: name 'b'" in one(stateless, "def f(a: b): ...")  # no future import of ours is inherited


def test_an_error_is_the_end_of_its_traceback(stateless: Python) -> None:
    found = one(stateless, "print('before')\ndef f():\n    return 1 / 0\nf()")
    assert found.startswith("before\nTraceback (most recent call last):\n")
    assert "    return 1 / 0" in found and found.endswith("ZeroDivisionError: division by zero")
    assert "python_cells" not in found and "program.py" not in found
    deep = one(stateless, "raise ValueError('y' * 1000 + 'end')")
    assert deep.endswith("yend") and "characters left out" in deep and len(deep) < 400
    assert one(stateless, "x =").endswith("SyntaxError: invalid syntax")
    assert "RecursionError" in one(stateless, "def f(): f()\nf()")


def test_every_limit_is_observed(stateless: Python) -> None:
    assert one(stateless, "print('x' * 1000)") == "x" * 200 + "\n[... 800 characters left out ...]"
    assert one(stateless, "while True: pass") == "Stopped: it used more than 1 s of CPU time."
    assert one(stateless, "while True: print('x' * 1000)").endswith("Stopped: it printed more than 4 MiB.")
    assert "MemoryError" in one(stateless, "x = [0] * 10**9")
    assert "Network is unreachable" in one(stateless, "import socket\nsocket.socket().connect(('8.8.8.8', 53))")


def test_each_call_starts_anew_without_state(stateless: Python) -> None:
    assert "NameError" in ask(episode(stateless), "x = 1", "x")[1]


def test_variables_live_as_long_as_the_episode(notebook: Python) -> None:
    first, second = episode(notebook), episode(notebook)
    told = ask(first, "print('once')\nx = [1]", "x.append(2)\nx", "1 / 0", "x.append(2)\nx")
    assert told[0] == "once" and told[1] == "[1, 2]" and "ZeroDivisionError" in told[2] and told[3] == "[1, 2, 2]"
    assert "NameError" in ask(second, "x")[0]
    drawn = ask(first, "import random\nr = random.random()\nr", "r")
    assert drawn[0] == drawn[1]
    assert first.counts == {("python", "answer"): 6}


def test_a_replayed_episode_reaches_the_same_state(notebook: Python) -> None:
    codes = ("import random\na = random.random()", "b = {a: 'x'}", "print(a, b)")
    assert ask(episode(notebook), *codes) == ask(episode(notebook), *codes)


def test_calls_that_do_not_run_again_are_reported(notebook: Python) -> None:
    session = episode(notebook)
    until = f"import time\nassert time.time() < {time.time() + 5.0}\nx = 1"
    assert ask(session, until, "x")[1] == "1"
    time.sleep(5.0)
    assert ask(session, "x", "'x' in globals()") == [python.LOST, "False"]


def test_a_sandbox_that_cannot_start_is_not_observed(notebook: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook._sandbox, "_bwrap", "/no/such/bwrap")
    with pytest.raises(ToolFailure, match="/no/such/bwrap"):
        one(notebook, "1")
    monkeypatch.setenv("PATH", "/no/such")
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        Python(LIMITS)


@functools.cache
def shared() -> Python:
    """Hypothesis wants no fixture of a function."""
    return Python(LIMITS)


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=[]), max_size=40))
def test_no_code_raises_or_answers_control_characters(code: str) -> None:
    answer = one(shared(), code)
    answer.encode()
    assert answer == plain(answer)


@given(st.text(max_size=30), st.integers(0, 40))
def test_bounded_texts(text: str, chars: int) -> None:
    if len(text) <= chars:
        assert head(text, chars) == tail(text, chars) == text
    else:
        left = f"[... {len(text) - chars} characters left out ...]"
        assert head(text, chars) == f"{text[:chars]}\n{left}"
        assert tail(text, chars) == f"{left}\n{text[len(text) - chars :]}"


def test_a_call_takes_at_most_60_ms(stateless: Python) -> None:
    """The quickest of 30, because machines that run the tests are shared. The bound that fails is wider."""

    def seconds(code: str) -> float:
        begun = time.perf_counter()
        one(stateless, code)
        return time.perf_counter() - begun

    assert min(seconds(f"1 + {i}") for i in range(30)) < 0.3
