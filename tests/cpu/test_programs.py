"""Code: programs in a real sandbox. What a hostile one may not do, what counts as right, and what a row may hold."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.config import ConfigError, TaskData, TaskSource
from icrl_megatron.tasks import programs, registry, sandbox
from icrl_megatron.tasks.base import Checked, EnvironmentFailure
from icrl_megatron.tasks.programs import Case, judged, last_program, same_output
from icrl_megatron.tasks.sandbox import Limits, Ran, Sandbox, seccomp_filter
from icrl_megatron.tasks.sandbox_guest import encoded

LIMITS = Limits(cpu_s=2.0, memory_bytes=256 << 20)


def why_not() -> str:
    """Why no sandbox can be made here; empty when one can."""
    try:
        Sandbox(LIMITS).check()
    except ConfigError as error:
        return str(error)
    return ""


REASON = why_not()
sandboxed = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(LIMITS)


def run(box: Sandbox, program: str, stdin: str = "") -> Ran:
    ran = box.run(program, stdin)
    assert len(ran.output) <= sandbox.OUTPUT_BYTES + (1 << 16)
    return ran


# Hostile programs


@sandboxed
def test_a_program_reads_and_prints(box: Sandbox) -> None:
    ran = run(box, "import sys\nprint(sum(map(int, sys.stdin.read().split())))", "1 2\n3\n")
    assert ran == Ran("done", b"6\n", b"", b"")
    failed = run(box, "print('so far')\n1 / 0")
    assert failed.end == "failed" and failed.output == b"so far\n" and b"ZeroDivisionError" in failed.errors
    assert run(box, "exit()").end == "done" and run(box, "import sys; sys.exit(3)").end == "failed"


@sandboxed
@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['/python/bin/python3', '-c', '1'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import os\nos.posix_spawn('/python/bin/python3', ['python3'], {})",
    ],
    ids=["fork bomb", "subprocess", "multiprocessing", "spawn"],
)
def test_no_processes(box: Sandbox, program: str) -> None:
    ran = run(box, program)
    assert ran.end == "failed" and b"Operation not permitted" in ran.errors


@sandboxed
def test_threads_work_and_a_bomb_of_them_ends(box: Sandbox) -> None:
    program = "import threading\nt = threading.Thread(target=print, args=('here',)); t.start(); t.join()"
    assert run(box, program).output == b"here\n"
    bomb = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(999,)).start()"
    ran = run(box, bomb)
    assert ran.end in ("failed", "cpu", "clock")


@sandboxed
@pytest.mark.parametrize(
    "program",
    ["x = bytearray(1 << 30)", "x = []\nwhile True: x.append(bytes(1 << 20))", "x = 'a' * (1 << 30)\nprint(len(x))"],
)
def test_a_gigabyte_is_refused(box: Sandbox, program: str) -> None:
    ran = run(box, program)
    assert ran.end == "failed" and b"MemoryError" in ran.errors


@sandboxed
def test_no_memory_beside_that_which_is_counted(box: Sandbox) -> None:
    written = (
        "import os\nfor i in range(99):\n  with open(f'/tmp/{i}', 'wb') as f:\n    f.write(bytes(1 << 20))\n  print(i)"
    )
    ran = run(box, written)
    assert ran.end == "failed" and b"No space left" in ran.errors and 10 <= ran.output.count(b"\n") <= 16
    assert b"not permitted" in run(box, "import os\nos.memfd_create('x')").errors
    raised = "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
    assert b"not allowed" in run(box, raised).errors


@sandboxed
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output_is_cut_off(box: Sandbox, stream: str) -> None:
    begun = time.monotonic()
    assert run(box, f"import sys\nwhile True: sys.{stream}.write('y' * 65536)").end == "output"
    assert time.monotonic() - begun < LIMITS.clock_s


@sandboxed
@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc/hostname", "/root", "/home", "/proc/1/environ", "/sys", "/dev/shm", "/var", "/run"]
)
def test_the_host_cannot_be_read(box: Sandbox, path: str) -> None:
    ran = run(box, f"import os\nprint(os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).read())")
    assert ran.end == "failed" and b"No such file" in ran.errors and ran.output == b""


@sandboxed
def test_what_is_there_is_python_and_nothing_of_this_repository(box: Sandbox) -> None:
    program = "import os\nfor root, _, files in os.walk('/'):\n  for f in files: print(os.path.join(root, f))"
    seen = run(box, program).output.decode().splitlines()
    places = ("/python/", "/usr/lib", "/lib", "/dev/", "/program.py", "/guest.py")
    assert "/program.py" in seen and all(name.startswith(places) for name in seen)
    assert not any("icrl" in name for name in seen)
    home = str(Path.home()).encode()
    assert home not in run(box, "import os\nprint(dict(os.environ))").output


@sandboxed
@pytest.mark.parametrize("path", ["/x", "/python/lib/x", "/usr/lib/x", "/program.py", "/dev/x", "/../../../tmp/../x"])
def test_nothing_outside_can_be_written(box: Sandbox, path: str) -> None:
    ran = run(box, f"open({path!r}, 'w').write('x')")
    assert ran.end == "failed" and (b"Read-only" in ran.errors or b"Permission" in ran.errors)


@sandboxed
def test_what_one_program_writes_no_other_reads(box: Sandbox) -> None:
    name = f"mine_{os.getpid()}"
    assert run(box, f"open('/tmp/{name}', 'w').write('x')\nprint(open('{name}').read())").output == b"x\n"
    assert run(box, "import os\nprint(os.listdir('/tmp'))").output == b"[]\n"
    assert not Path(f"/tmp/{name}").exists()


@sandboxed
def test_no_network(box: Sandbox) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with listener:
        ran = run(box, f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
        assert ran.end == "failed" and b"refused" in ran.errors
    ran = run(box, "import socket\nsocket.create_connection(('192.0.2.1', 80), 1)")
    assert ran.end == "failed" and b"unreachable" in ran.errors


@sandboxed
def test_time_on_the_processor_and_on_the_clock(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    spin = "while True: pass"
    assert run(box, spin).end in ("cpu", "clock")
    stubborn = f"import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n{spin}"
    assert run(box, stubborn).end in ("cpu", "clock")
    monkeypatch.setattr(sandbox, "CLOCK_EXTRA_S", 1.0)
    quick = Sandbox(Limits(1.0, 256 << 20))
    begun = time.monotonic()
    assert run(quick, "import time\ntime.sleep(3600)").end == "clock"
    # Closed pipes are no end.
    assert run(quick, "import os, time\nfor fd in range(64):\n  try: os.close(fd)\n  except OSError: pass\ntime.sleep(99)").end == "clock"  # fmt: skip  # noqa: E501
    assert time.monotonic() - begun < 60


@sandboxed
def test_parents_survive(box: Sandbox) -> None:
    program = (
        "import os, signal\n"
        "for pid in (os.getppid(), 1, 0, -1):\n"
        "  for s in (signal.SIGTERM, signal.SIGKILL):\n"
        "    try: pid and os.kill(pid, s)\n"
        "    except OSError as error: print(error)\n"
        "print('still here')"
    )
    ran = run(box, program)
    assert b"still here" in ran.output and ran.end == "done"
    assert run(box, f"import os\nos.kill({os.getpid()}, 9)").end == "failed"
    assert run(box, "import os\nos.kill(os.getpid(), 11)").end == "failed"


@sandboxed
def test_system_calls_that_are_denied(box: Sandbox) -> None:
    numbers = {"unshare": 272, "ptrace": 101, "io_uring_setup": 425, "shmget": 29, "clone3": 435, "x32": 0x40000039}
    if platform.machine() != "x86_64":
        numbers = {"unshare": 97, "ptrace": 117, "io_uring_setup": 425, "shmget": 194, "clone3": 435}
    program = (
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"for n in {list(numbers.values())}:\n  print(libc.syscall(n, 0, 0, 0), errno.errorcode[ctypes.get_errno()])"
    )
    lines = run(box, program).output.decode().splitlines()
    assert lines == ["-1 ENOSYS" if name == "clone3" else "-1 EPERM" for name in numbers]


@sandboxed
def test_a_killed_trainer_leaves_no_program_behind() -> None:
    mark = f"left_{os.getpid()}"
    script = (
        "from icrl_megatron.tasks.sandbox import Limits, Sandbox\n"
        f"Sandbox(Limits(60.0, 256 << 20)).run('import time; {mark} = 1; time.sleep(600)')"
    )
    process = subprocess.Popen([sys.executable, "-c", script])

    def alive() -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if b"/guest.py" in (entry / "cmdline").read_bytes() and entry.name.isdecimal():
                    found.append(entry.name)
            except OSError:
                continue
        return found

    before = set(alive())
    for _ in range(300):
        started = set(alive()) - before
        if len(started) >= 2:
            break
        time.sleep(0.1)
    assert started
    process.kill()
    process.wait(timeout=30)
    for _ in range(100):
        if not started & set(alive()):
            break
        time.sleep(0.1)
    assert not started & set(alive())


# Verdicts

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert [1, 2] == add([1], [2])"]


def cases(label: object) -> list[Case]:
    return list(programs._cases(label if isinstance(label, str) else json.dumps(label)))


@sandboxed
@pytest.mark.parametrize(
    ("program", "tests", "part"),
    [
        (ADD, TESTS, None),
        (ADD.replace("+", "-"), TESTS, "Test 1 of 3 failed. The value was '-1'. It evaluated 'add(1, 2)'"),
        ("def add(a, b): return 3", TESTS, "Test 2 of 3"),
        ("def plus(a, b): return 3", TESTS, "NameError: name 'add' is not defined"),
        ("def add(:", TESTS, "SyntaxError"),
        (ADD, ["import math\nassert math.isclose(add(0.1, 0.2), 0.3)", "assert add(1, 1)"], None),
        (ADD, ["assert add(1, 1) < 2"], "Test 1 of 1"),
        (ADD, ["assert add((), ()) is None"], "Test 1 of 1"),
        (f"{ADD}\nif __name__ == '__main__': 1 / 0", TESTS, None),
        ("import os\ndef add(a, b): os._exit(0)", TESTS, "ended before it could be called"),
        ("import sys\nsys.exit(0)", TESTS, "ended before it could be called"),
        (
            "class Yes:\n  def __eq__(s, o): return True\n  __hash__ = None\ndef add(a, b): return Yes()",
            TESTS,
            "Test 1",
        ),
        ("def add(a, b): x = []; x.append(x); return x", TESTS, "RecursionError"),
        ("def add(a, b):\n  while True: pass", TESTS, "Test 1 of 3 failed. The program "),
    ],
)
def test_asserts(box: Sandbox, program: str, tests: list[str], part: str | None) -> None:
    verdict = judged(program, cases(tests), box, 0.0)
    assert verdict.right is (part is None) and (part or "passes all") in verdict.remark, verdict


@sandboxed
def test_expected_outputs_are_nowhere_in_the_sandbox(box: Sandbox) -> None:
    """A program that looks everywhere it can while it is called: frames, garbage, its files and its input."""
    secret = 918273645
    looks = (
        "import gc, os, sys\n"
        "def f():\n"
        "  seen = [repr(o)[:100000] for o in gc.get_objects() if isinstance(o, (dict, list, tuple, str))]\n"
        "  frame = sys._getframe()\n"
        "  while frame: seen += [repr(frame.f_code.co_consts), repr(frame.f_locals)]; frame = frame.f_back\n"
        "  for fd in range(64):\n"
        "    try: os.lseek(fd, 0, 0); seen.append(repr(os.read(fd, 1 << 20)))\n"
        "    except OSError: pass\n"
        "  seen += [open(n).read() for n in ('/program.py', '/guest.py')]\n"
        f"  number = {secret - 1} + len('x')\n"
        "  return any(str(number) in s or hex(number) in s for s in seen), len(seen) > 20\n"
    )
    (case,) = cases([f"assert f() == {secret}"])
    assert str(hex(secret)) in case.expected and str(secret) not in case.value
    verdict = judged(looks, [case], box, 0.0)
    assert "The value was '(False, True)'" in verdict.remark
    # Printing programs get their input alone.
    assert judged("import sys\nprint(sys.stdin.read())", [Case(str(secret), stdin="in")], box, 0.0).right is False


@sandboxed
def test_inputs_and_outputs(box: Sandbox) -> None:
    double = "for line in iter(input, 'end'): print(int(line) * 2)"
    label = {"inputs": ["1\n2\nend\n", ["3", "end"]], "outputs": ["2\n4", "6\n"]}
    assert judged(double, cases(label), box, 0.0).right
    wrong = judged(double, cases([{"input": "5\nend", "output": "11"}]), box, 0.0)
    assert wrong.remark == "Test 1 of 1 failed. The program printed '10\\n'. Its input was '5\\nend'."
    large = "x" * 3_000_000  # more than any pipe holds
    assert judged("print(len(input()))", [Case("3000000", stdin=large)], box, 0.0).right
    assert judged("print(input())", [Case("y", stdin=large)], box, 0.0).remark.count("x") < 1000
    assert not judged("#" * (programs.MAX_PROGRAM_CHARS + 1), [Case("")], box, 0.0).right


@pytest.mark.parametrize(
    ("given", "expected", "tolerance", "same"),
    [
        ("1 2\n", "1 2", 0.0, True),
        ("1 2 \n\n", "\n1 2", 0.0, True),
        ("1  2", "1 2", 0.0, False),
        ("1\n2", "1 2", 0.0, False),
        ("0.3333", "0.333333", 0.0, False),
        ("x 0.3333", "x 0.333333", 1e-3, True),
        ("y 0.3333", "x 0.333333", 1e-3, False),
        ("1 2", "1", 1e-3, False),
        ("nan", "1", 1e-3, False),
        ("", "", 0.0, True),
    ],
)
def test_outputs_are_compared(given: str, expected: str, tolerance: float, same: bool) -> None:
    assert same_output(given, expected, tolerance) is same


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3).map(lambda x: round(x * 2) / 2) | st.text("ab"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text("ab", max_size=2) | st.integers(0, 2), inner, max_size=3)
        | st.frozensets(st.integers(0, 3) | st.floats(0, 3).map(round), max_size=3)
    ),
    max_leaves=6,
)


@given(VALUES, VALUES)
def test_encodings_are_equal_where_python_says_so(left: object, right: object) -> None:
    assert (encoded(left) == encoded(right)) is (left == right)


# Replies


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("So:\n```python\nprint(1)\n```\nDone.", "print(1)"),
        ("```\na\n```\nbetter:\n```py\nb\n\nc\n```", "b\n\nc"),
        ("```python\na\n```\noutput:\n```text\n1\n```", "a"),
        ("```python\na\n```\nand\n```python\nb", "a"),
        ("```python\na\n```python\nb\n```", "b"),
        ("``` python\r\na\r\n```\r\n", "a"),
        ("print(1)", None),
        ("```python\n\n```", None),
        ("", None),
    ],
)
def test_the_last_program_counts(reply: str, program: str | None) -> None:
    assert last_program(reply) == program


@given(st.text(alphabet="`python\n \t\rx"))
def test_no_reply_breaks_the_search(reply: str) -> None:
    found = last_program(reply)
    assert found is None or (found in reply and found.strip())


# The task set


def dataset(folder: Path, rows: list[dict[str, object]], **data: object) -> TaskSource:
    for name, content in (("train", rows), ("heldout", [{"prompt": "held?", "label": ["assert True"]}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    paths = {name: [str(folder / f"{name}.jsonl")] for name in ("train", "heldout")}
    return TaskSource("code", data=TaskData(**paths, **data))  # type: ignore[arg-type]


@sandboxed
def test_many_answers_are_judged_at_once_and_a_bad_one_holds_up_no_other(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "Add.", "label": TESTS}]
    task_set = registry.of_source(dataset(tmp_path, rows, grading_timeout_s=2.0, program_memory_mib=256))
    assert isinstance(task_set, Checked)
    task_set.check()
    task = task_set.problems("train")[0]

    async def attempt(program: str) -> tuple[bool, str]:
        environment = task_set.environment(task)
        assert (await environment.reset()).startswith("Add.\n\n")
        action = environment.parse(f"I think\n```python\n{program}\n```")
        assert action == program and (await environment.step(action)).done
        assert environment.outcome() == float(environment.success())
        return environment.success(), environment.summary()

    async def all_at_once() -> list[tuple[bool, str]]:
        return await asyncio.gather(*(attempt(p) for p in (ADD, "while True: pass", ADD, "import os\nos.fork()")))

    verdicts = asyncio.run(all_at_once())
    assert [right for right, _ in verdicts] == [True, False, True, False]
    assert "passes all 3" in verdicts[0][1] and "PermissionError" in verdicts[3][1]


@pytest.mark.parametrize(
    ("label", "part"),
    [
        ([], "label' is empty"),
        ({"inputs": ["1"], "outputs": []}, "same length"),
        ({"inputs": ["1"], "outputs": [1]}, "output is 1, which is no text"),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}, "fn_name"),
        ([{"input": "1"}], "output is None"),
        ("assert f(", "line 1"),
        (["x = 1"], "no assert"),
        ("42", "line 1"),
    ],
)
def test_labels_without_tests_are_named(tmp_path: Path, label: object, part: str) -> None:
    rows: list[dict[str, object]] = [{"prompt": "p?", "label": label}]
    with pytest.raises(ConfigError) as raised:
        registry.of_source(dataset(tmp_path, rows)).problems("train")
    assert "train.jsonl, line 1" in str(raised.value) and part in str(raised.value)


def test_limits_that_cannot_work(tmp_path: Path) -> None:
    for name, value in (("program_memory_mib", 1), ("grading_workers", 0), ("grading_timeout_s", float("nan"))):
        with pytest.raises(ConfigError, match=f"data.{name}="):
            registry.of_source(dataset(tmp_path, [], **{name: value}))


def test_it_is_refused_where_bubblewrap_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    task_set = registry.of_source(dataset(tmp_path, [{"prompt": "p?", "label": TESTS}]))
    assert isinstance(task_set, Checked)
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        task_set.check()


def fake(folder: Path, script: str) -> None:
    (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bwrap").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions to create new namespace"),
        ("exit 0", "user namespaces"),
    ],
)
def test_it_is_refused_where_no_namespaces_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, part: str
) -> None:
    fake(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    box = Sandbox(LIMITS)
    with pytest.raises(ConfigError, match=part):
        box.check()
    # During a run it costs the episode, and is no verdict.
    with pytest.raises(EnvironmentFailure):
        judged(ADD, cases(TESTS), box, 0.0)


def test_other_processors_are_refused() -> None:
    assert len(seccomp_filter("x86_64")) % 8 == 0 and seccomp_filter("aarch64") != seccomp_filter("x86_64")
    with pytest.raises(ConfigError, match="riscv64"):
        seccomp_filter("riscv64")
