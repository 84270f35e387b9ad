"""Starts the ranks of a run on this machine and stays their parent: one signal a rank, no orphans, plain exit codes.

    icrl train (launcher)  ->  icrl_megatron.agent  ->  ranks (icrl_megatron.train)

The ranks leave how they ended in a small file that the launcher reads: one message, not one a rank. The ranks' side,
`run_rank` and `StopRequest`, works under a plain torchrun too.

Exit codes: 0 done; 1 failed; 2 ConfigError; 3 stopped on request after saving (the same command goes on); 130 killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from icrl_megatron.config import ConfigError, HopelessError
from icrl_megatron.telemetry.disk import disk_errors, unexplained_errors
from icrl_megatron.telemetry.progress import Progress
from icrl_megatron.telemetry.terminal import guard

HOPELESS = 1
CONFIG_ERROR = 2
STOPPED = 3
KILLED = 130

OUTCOME_ENV = "ICRL_OUTCOME"
"""File that the first rank with something to say writes {"code", "message"} to; whoever starts the agent may set it."""
STOP_ENV = "ICRL_STOP"
"""File whose existence means stop: a signal that comes before a rank listens would be lost, and in a container it may
kill what serves the file system (slurm/job.sh)."""
STARTED_ENV = "ICRL_STARTED"
"""File that rank 0 makes when the ranks have met: from then on the terminal is its own."""
PARENT_ENV = "ICRL_PARENT"
"""Process id of the parent that a child must not outlive."""
STORE_FD_ENV = "ICRL_STORE_FD"
"""Descriptor of the bound socket on which rank 0 serves the job's store."""

LEAVE_TIMEOUT_S = 30.0
"""From the end of a rank's work to the end of its process, at most."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def is_rank() -> bool:
    """Whether this process is a rank already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(
    settings_path: Path,
    ranks: int,
    log_dir: Path,
    module: str = "icrl_megatron.train",
    stop_timeout_s: float = 1800.0,
) -> int:
    """Runs `python -m MODULE SETTINGS` in `ranks` processes and returns one of the exit codes above.

    Rank 0 owns the terminal; the others write to files under `log_dir`, and the end of the one that failed first is
    shown. The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 reaches each rank as one SIGUSR1; they have `stop_timeout_s` to
    save before they are killed. A second SIGINT kills them at once. Must be called from the main thread.
    """
    with disk_errors(log_dir, "the logs of ranks"):
        log_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "icrl_megatron.agent", f"--nproc-per-node={ranks}", f"--log-dir={log_dir}"]
    command += ["-m", module, str(settings_path)]
    # Not on the disk of the run: ranks say there, too, that this disk is full.
    with tempfile.TemporaryDirectory(prefix="icrl_launch_") as control, _counting_signals() as received:
        outcome, stop, started = (Path(control) / name for name in ("outcome.json", "stop", "started"))
        # Its own session: Ctrl-C in a terminal reaches the launcher alone, and the ranks hear of it once.
        env = _environment(ranks, outcome, stop, started)
        agent = subprocess.Popen(command, env=env, start_new_session=True)
        try:
            with _starting(ranks, started) as tick:
                killed = _wait(agent, received, stop, stop_timeout_s, tick)
        finally:
            _kill_tree(agent)
        return killed or _exit_code(agent.returncode, outcome)


def run_rank(main: Callable[[], int]) -> NoReturn:
    """What a rank's entry point wraps itself in: dies with its parent, and leaves its outcome for the launcher.

    `main` returns 0, or STOPPED when all ranks agreed to stop. The process then exits with 0 in both cases, because the
    agent ends the other ranks as soon as one exits otherwise; with 2 after a ConfigError and 1 after a
    HopelessError, whose messages need no traceback.
    """
    guard()
    die_with_parent()
    try:
        with unexplained_errors():
            code = main()
    except (ConfigError, HopelessError) as error:
        ended = CONFIG_ERROR if isinstance(error, ConfigError) else HOPELESS
        leave_outcome(ended, str(error))
        _leave(ended)
    if code == STOPPED:
        leave_outcome(STOPPED, "stopped on request")
        code = 0
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends the process, and does not wait long for threads that an environment may have left running."""
    # Python gives signals their default action back while it ends: a stop request that comes then would kill the rank.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    last = threading.Timer(LEAVE_TIMEOUT_S, os._exit, [code])
    last.daemon = True
    last.start()
    sys.exit(code)


def report_started() -> None:
    """Rank 0 says that it writes to the terminal from here on, if anybody wants to know."""
    if os.environ.get(STARTED_ENV):
        Path(os.environ[STARTED_ENV]).touch()


class StopRequest:
    """Whether this rank was asked to stop. A flag only: the loop agrees on it with all ranks between two steps."""

    def __init__(self) -> None:
        """Starts listening to SIGUSR1 and SIGTERM; call it in the main thread, before anything slow."""
        self._set = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        named = os.environ.get(STOP_ENV)
        self._file = Path(named) if named else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._set = True

    def __bool__(self) -> bool:
        self._set = self._set or (self._file is not None and self._file.exists())
        return self._set


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Asks Linux to send this process a signal when its parent dies, even of SIGKILL; ends it if that already
    happened."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # Taken out, so that a child of this process does not compare with its grandparent.
    parent = os.environ.pop(PARENT_ENV, "")
    if parent and os.getppid() != int(parent):
        os._exit(1)


def read_outcome(path: Path) -> tuple[int, str] | None:
    """(exit code, message) that a rank left, None if none did."""
    try:
        left = json.loads(path.read_text(encoding="utf-8"))
        return int(left["code"]), str(left["message"])
    except FileNotFoundError:
        return None


def leave_outcome(code: int, message: str) -> None:
    """Writes how this rank ended where the launcher asked for it; the first rank to write wins. An error is printed
    where nobody asked, or the file cannot be written."""
    name = os.environ.get(OUTCOME_ENV)
    if name:
        path = Path(name)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps({"code": code, "message": message}), encoding="utf-8")
            with contextlib.suppress(FileExistsError):
                os.link(part, path)
            return
        except OSError:
            pass
        finally:
            part.unlink(missing_ok=True)
    if code in (CONFIG_ERROR, HOPELESS):
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr)


def _environment(ranks: int, outcome: Path, stop: Path, started: Path) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
    ours = {OUTCOME_ENV: outcome, STOP_ENV: stop, STARTED_ENV: started, PARENT_ENV: os.getpid()}
    return {**defaults, **os.environ, **{name: str(value) for name, value in ours.items()}}


@contextlib.contextmanager
def _starting(ranks: int, started: Path) -> Iterator[Callable[[], None]]:
    """A bar until the file `started` exists: importing torch and Megatron takes seconds, and nobody else says so."""
    with contextlib.ExitStack() as shown:
        phase = shown.enter_context(Progress().phase("starting 1 rank" if ranks == 1 else f"starting {ranks} ranks"))

        def tick() -> None:
            if started.exists():
                shown.close()
            else:
                phase.advance(0)

        yield tick


@contextlib.contextmanager
def _counting_signals() -> Iterator[dict[int, int]]:
    """Counts the stop signals by number instead of dying of them; puts the former handlers back."""
    received = dict.fromkeys(map(int, _STOP_SIGNALS), 0)

    def count(number: int, frame: FrameType | None) -> None:
        received[number] += 1

    before = {number: signal.signal(number, count) for number in _STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    agent: subprocess.Popen[bytes],
    received: dict[int, int],
    stop: Path,
    stop_timeout_s: float,
    tick: Callable[[], None],
) -> int:
    """Until the agent ends: 0 then, or an exit code of ours when it has to be killed. Forwards one stop request."""
    deadline = None
    while True:
        tick()
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(timeout=0.1)
            return 0
        if deadline is None and any(received.values()):
            deadline = time.monotonic() + stop_timeout_s
            stop.touch()
            for rank in _children(agent.pid, recursive=False):
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGUSR1)
            print("stopping: the ranks save first; Ctrl-C again ends them at once", file=sys.stderr)
        if received[signal.SIGINT] > 1:
            return KILLED
        if deadline is not None and time.monotonic() > deadline:
            print(f"error: the ranks did not stop within {stop_timeout_s:.0f} s and were killed", file=sys.stderr)
            return 1


def _children(pid: int, recursive: bool) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=recursive))
    except psutil.NoSuchProcess:
        return []


def _kill_tree(agent: subprocess.Popen[bytes]) -> None:
    """Kills what is left below the agent, and reaps it; nothing when it has ended by itself."""
    if agent.poll() is None:
        below = _children(agent.pid, recursive=True)
        agent.kill()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        agent.wait()


def _exit_code(returncode: int, outcome: Path) -> int:
    left = read_outcome(outcome)
    if left is not None and left[0] in (CONFIG_ERROR, HOPELESS):
        print(f"error: {left[1]}", file=sys.stderr)
        return left[0]
    if returncode != 0:
        return CONFIG_ERROR if returncode == CONFIG_ERROR else 1
    return left[0] if left is not None else 0
