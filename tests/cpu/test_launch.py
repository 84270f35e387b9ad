"""The launcher and the agent with real signals; the ranks are small modules without collectives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from commands import python
from disks import small_disk

from icrl_megatron.distributed import process
from icrl_megatron.launch import torchrun as launch
from icrl_megatron.utils import parent_watch

LAUNCHER = """
import sys
from pathlib import Path
from icrl_megatron.launch.torchrun import launch
sys.exit(launch(Path("settings.yaml"), int(sys.argv[2]), Path("logs"), module=sys.argv[1], stop_timeout_s=20))
"""

RANK_HEAD = """
import os, signal, sys, time
from pathlib import Path
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.distributed.process import STOPPED, StopRequest, run_rank

rank = os.environ["RANK"]

def note(name, text=""):
    Path(f"{name}.{rank}.part").write_text(text)
    Path(f"{name}.{rank}.part").rename(f"{name}.{rank}")
"""


def rank_module(body: str) -> str:
    """A program with the `main` of `body`."""
    return f"{RANK_HEAD}{body}\nif __name__ == '__main__':\n    run_rank(main)\n"


def python_path(folder: Path) -> str:
    """This folder, then the tested checkout."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))


class Launched:
    """A launcher process in its own folder, with the rank module `ranks.py` beside it."""

    def __init__(self, folder: Path, body: str, ranks: int, stderr: int = subprocess.PIPE) -> None:
        self.folder = folder
        (folder / "ranks.py").write_text(rank_module(body))
        (folder / "launcher.py").write_text(LAUNCHER)
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, "launcher.py", "ranks", str(ranks)],
            cwd=folder,
            env={**clean, "PYTHONPATH": python_path(folder), "TERM": "xterm"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def await_files(self, *names: str, timeout_s: float = 90) -> list[str]:
        deadline = time.monotonic() + timeout_s
        while not all((self.folder / name).exists() for name in names):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"no {names}: {self.process.communicate(timeout=1)}")
            time.sleep(0.05)
        return self.read(*names)

    def read(self, *names: str) -> list[str]:
        return [(self.folder / name).read_text() for name in names]

    def end(self, timeout_s: float = 90) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err


Start = Callable[[str, int], Launched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Launched] = []

    def begin(body: str, ranks: int) -> Launched:
        started.append(Launched(tmp_path, body, ranks))
        return started[-1]

    yield begin
    for launched in started:
        if launched.process.poll() is None:
            launched.process.kill()
            launched.process.communicate()


WORKS = """
def main():
    note("seen", f"{sys.argv[1]} {os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']}")
    print("hello from", rank)
    return 0
"""


@pytest.mark.parametrize("ranks", [2, 11])
def test_rank_0_prints_to_the_terminal_and_other_ranks_to_logs(start: Start, ranks: int) -> None:
    launched = start(WORKS, ranks)
    code, out, err = launched.end()
    assert (code, out) == (0, "hello from 0\n"), err
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    assert launched.read("seen.0", "seen.1") == [f"settings.yaml {ranks} {threads}"] * 2
    (log,) = launched.folder.glob(f"logs/*/rank_{ranks - 1}.log")
    assert log.read_text() == f"hello from {ranks - 1}\n"


@pytest.mark.parametrize(("processes", "threads"), [(1, "8"), (2, "4"), (3, "2"), (16, "1")])
def test_processes_that_compute_at_once_share_the_cores(
    processes: int, threads: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With more threads than cores, an asynchronous run on a busy machine took five times as long."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert launch._environment(processes, tmp_path, tmp_path, tmp_path)["OMP_NUM_THREADS"] == threads


ENDS_SLOWLY = """
class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1):
        kill(pid, number)

last = Last()

def main():
    StopRequest()
    return 0
"""


def test_a_stop_request_does_not_kill_a_rank_that_ends(start: Start) -> None:
    """The signal arrives while the interpreter exits, when Python has restored the default action of signals."""
    code, _, err = start(ENDS_SLOWLY, 1).end()
    assert code == 0, err


CONFIG_ERROR_BODY = """
def main():
    raise ConfigError("steps=-1: must be at least 0")
"""


def test_a_config_error_of_the_ranks_is_one_message_and_code_2(start: Start) -> None:
    code, out, err = start(CONFIG_ERROR_BODY, 2).end()
    assert (code, out, err) == (launch.CONFIG_ERROR, "", "error: steps=-1: must be at least 0\n")


FAILS = """
def main():
    if rank == "1":
        raise RuntimeError("the flux is out of range")
    stop = StopRequest()
    while not stop:
        time.sleep(0.05)
    return 0
"""


FILLS_THE_DISK = """
def main():
    if rank == FAILING:
        with open("filler", "wb") as file:
            file.write(bytes(10**7))
    while True:
        time.sleep(0.1)
"""
FULL = (
    "error: a file that the program writes: the disk is full; free some space there, or choose a folder on another "
    "disk\n"
)


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_full_disk_is_one_message_without_a_traceback(failing: str, tmp_path: Path) -> None:
    """The launcher and the ranks do not communicate through the run's disk."""
    with small_disk(tmp_path / "disk", 256) as disk:
        launched = Launched(disk, FILLS_THE_DISK.replace("FAILING", repr(failing)), 2)
        code, out, err = launched.end()
        said = [line for line in err.splitlines(keepends=True) if not line.startswith("starting")]
        assert (code, out, said) == (launch.CONFIG_ERROR, "", [FULL])


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_rank_that_cannot_write_its_outcome_prints_the_message(failing: str, tmp_path: Path) -> None:
    """A batch job's outcome file is on the disk of its logs. The agent prints nothing else and exits with the code."""
    fills = FILLS_THE_DISK.replace("FAILING", repr(failing)).replace("filler", "disk/filler")
    (tmp_path / "ranks.py").write_text(rank_module(fills))
    with small_disk(tmp_path / "disk", 256) as disk:
        arguments = ["--nproc-per-node=2", f"--log-dir={tmp_path / 'logs'}", "-m", "ranks", "x"]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env |= {launch.OUTCOME_ENV: str(disk / "outcome.json"), "PYTHONPATH": python_path(tmp_path)}
        done = python("-m", "icrl_megatron.launch.agent", *arguments, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (launch.CONFIG_ERROR, "", FULL)


def test_the_traceback_of_a_failing_rank_is_printed(start: Start) -> None:
    code, _, err = start(FAILS, 2).end()
    assert code == 1 and "ChildFailedError" not in err
    assert "RuntimeError: the flux is out of range" in err and "error: rank 1 failed with exit code 1" in err


HOSTILE = r"""
def main():
    stop = StopRequest()
    print("the model says: \x1b]0;owned\x07", flush=True)
    note("spoke")
    if rank == "1":
        while not Path("spoke.0").exists():  # otherwise rank 0 might be stopped before it prints
            time.sleep(0.05)
        raise RuntimeError("the server says: \x1b[2J")
    while not stop:
        time.sleep(0.05)
    raise RuntimeError("so does rank 0: \x9b2J")
"""


def test_control_characters_of_ranks_are_escaped(start: Start) -> None:
    """In the output of rank 0, and in what is printed of another rank's log."""
    launched = start(HOSTILE, 2)
    code, out, err = launched.end()
    assert code == 1
    assert not [c for c in out + err if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"], (out, err)
    assert out == "the model says: \\x1b]0;owned\\x07\n"
    assert "RuntimeError: the server says: \\x1b[2J" in err


WAITS = """
def main():
    count = 0
    stop = StopRequest()
    inner = signal.getsignal(signal.SIGUSR1)
    def counting(number, frame):
        nonlocal count
        count += 1
        inner(number, frame)
    signal.signal(signal.SIGUSR1, counting)
    note("ready", str(os.getpid()))
    while not stop:
        time.sleep(0.02)
    time.sleep(1.0)  # saving, while a second signal could come
    note("signals", str(count))
    return STOPPED
"""


SLOW_TO_LISTEN = """
note("started")
time.sleep(3)  # imports

def main():
    stop = StopRequest()
    note("heard", str(bool(stop)))
    return STOPPED if stop else 0
"""


@pytest.mark.parametrize(
    ("body", "begun", "number", "note", "text"),
    [
        *((WAITS, "ready", number, "signals", "1") for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)),
        (SLOW_TO_LISTEN, "started", signal.SIGTERM, "heard", "True"),
    ],
)
def test_a_stop_signal_reaches_every_rank_once(
    start: Start, body: str, begun: str, number: signal.Signals, note: str, text: str
) -> None:
    """All save; and it is not lost if it comes during the imports of the ranks."""
    launched = start(body, 2)
    launched.await_files(f"{begun}.0", f"{begun}.1")
    launched.process.send_signal(number)
    code, _, err = launched.end()
    assert code == process.STOPPED, err
    assert launched.read(f"{note}.0", f"{note}.1") == [text, text]


STUBBORN = """
def main():
    stop = StopRequest()
    note("ready", str(os.getpid()))
    while True:
        time.sleep(0.05)
"""


def _ended(pids: list[int], timeout_s: float = 10) -> bool:
    """Whether all of these processes end in time; a zombie has ended."""

    def runs(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + timeout_s
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))


def test_sigkill_of_the_launcher_ends_all_of_its_processes(start: Start) -> None:
    launched = start(STUBBORN, 2)
    launched.await_files("ready.0", "ready.1")
    below = [p.pid for p in psutil.Process(launched.process.pid).children(recursive=True)]
    assert len(below) >= 3  # the agent and two ranks
    launched.process.kill()
    assert _ended(below)


def test_a_second_interrupt_kills_the_ranks(start: Start) -> None:
    launched = start(STUBBORN, 2)
    ranks = [int(pid) for pid in launched.await_files("ready.0", "ready.1")]
    launched.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launched.process.poll() is None
    launched.process.send_signal(signal.SIGINT)
    code, _, _ = launched.end(timeout_s=15)
    assert code == launch.KILLED
    assert _ended(ranks)


def test_a_rank_whose_parent_has_died_exits() -> None:
    """The parent may die before the child has registered to be ended with it."""
    code = "from icrl_megatron.utils.parent_watch import die_with_parent; die_with_parent(); print('alive')"
    for parent, expected in ((os.getpid(), (0, "alive\n")), (os.getpid() + 1, (1, ""))):
        env = {**os.environ, parent_watch.PARENT_ENV: str(parent)}
        done = python("-c", code, env=env)
        assert (done.returncode, done.stdout) == expected


SLOW_START = """
import time
time.sleep(3)

def main():
    from icrl_megatron.distributed.process import report_started
    report_started()
    time.sleep(2)
    note("quiet")
    time.sleep(3)
    return 0
"""


def test_a_progress_bar_is_shown_until_the_ranks_have_started(tmp_path: Path) -> None:
    terminal, theirs = os.openpty()
    launched = Launched(tmp_path, SLOW_START, 1, theirs)
    os.close(theirs)
    shown, late = b"", b""
    try:
        while True:
            shown += (piece := os.read(terminal, 4096))
            late += piece if (tmp_path / "quiet.0").exists() else b""
    except OSError:  # the ranks have ended and closed the other end
        assert launched.end()[0] == 0
    finally:
        os.close(terminal)
    assert b"starting 1 rank" in shown
    assert b"starting" not in late


def test_a_process_is_a_rank_if_rank_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not process.is_rank()
    monkeypatch.setenv("RANK", "0")
    assert process.is_rank()


def test_a_stop_can_be_requested_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container it is the only way (slurm/job.sh)."""
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    monkeypatch.setenv(launch.STOP_ENV, str(tmp_path / "stop"))
    try:
        stop = process.StopRequest()
        assert not stop
        (tmp_path / "stop").touch()
        assert stop
        (tmp_path / "stop").unlink()
        assert stop
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
