"""The sandbox: malicious programs that really run in it, and machines where it cannot be created."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sandboxes import LIMITS, sandboxed

from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.utils import sandbox
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.sandbox import Ran, Sandbox, SandboxLimits, seccomp_filter


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(LIMITS)


def run(box: Sandbox, program: str, stdin: str = "") -> Ran:
    ran = box.run(program, stdin)
    assert len(ran.output) <= sandbox.OUTPUT_BYTES + (1 << 16)
    return ran


# Malicious programs


@sandboxed
def test_program_reads_and_prints(box: Sandbox) -> None:
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
def test_no_process_can_be_started(box: Sandbox, program: str) -> None:
    ran = run(box, program)
    assert ran.end == "failed" and b"Operation not permitted" in ran.errors


@sandboxed
def test_threads_work_and_endless_threads_are_stopped(box: Sandbox) -> None:
    program = "import threading\nt = threading.Thread(target=print, args=('here',)); t.start(); t.join()"
    assert run(box, program).output == b"here\n"
    endless = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(999,)).start()"
    ran = run(box, endless)
    assert ran.end in ("failed", "cpu", "clock")


@sandboxed
@pytest.mark.parametrize(
    "program",
    ["x = bytearray(1 << 30)", "x = []\nwhile True: x.append(bytes(1 << 20))", "x = 'a' * (1 << 30)\nprint(len(x))"],
)
def test_large_allocations_fail(box: Sandbox, program: str) -> None:
    ran = run(box, program)
    assert ran.end == "failed" and b"MemoryError" in ran.errors


@sandboxed
def test_files_and_raised_limits_give_no_extra_memory(box: Sandbox) -> None:
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
def test_endless_output_ends_the_program(box: Sandbox, stream: str) -> None:
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
def test_sandbox_contains_python_but_not_this_repository(box: Sandbox) -> None:
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
def test_files_of_one_program_are_invisible_to_others(box: Sandbox) -> None:
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
def test_cpu_time_and_wall_time_are_limited(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    spin = "while True: pass"
    assert run(box, spin).end in ("cpu", "clock")
    stubborn = f"import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n{spin}"
    assert run(box, stubborn).end in ("cpu", "clock")
    monkeypatch.setattr(sandbox, "CLOCK_EXTRA_S", 1.0)
    quick = Sandbox(SandboxLimits(1.0, 256 << 20))
    begun = time.monotonic()
    assert run(quick, "import time\ntime.sleep(3600)").end == "clock"
    # Closing the pipes does not end the run.
    assert run(quick, "import os, time\nfor fd in range(64):\n  try: os.close(fd)\n  except OSError: pass\ntime.sleep(99)").end == "clock"  # fmt: skip  # noqa: E501
    assert time.monotonic() - begun < 60


@sandboxed
def test_program_cannot_kill_other_processes(box: Sandbox) -> None:
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
def test_dangerous_system_calls_are_denied(box: Sandbox) -> None:
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
def test_program_ends_when_the_trainer_is_killed() -> None:
    mark = f"left_{os.getpid()}"
    script = (
        "from icrl_megatron.utils.sandbox import Sandbox, SandboxLimits\n"
        f"Sandbox(SandboxLimits(60.0, 256 << 20)).run('import time; {mark} = 1; time.sleep(600)')"
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


# Machines where it cannot be created


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
def test_no_namespaces_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, part: str) -> None:
    fake(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    box = Sandbox(LIMITS)
    with pytest.raises(ConfigError, match=part):
        box.check()
    # During a run, this costs the episode; it is not a verdict on the program.
    with pytest.raises(EnvironmentFailure):
        box.run("print(1)")


def test_missing_libseccomp_is_rejected_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(ConfigError, match="apt-get install libseccomp2"):
        seccomp_filter()
