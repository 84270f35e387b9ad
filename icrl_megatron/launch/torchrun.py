"""Starts the ranks of a run on this machine and supervises them: one signal per rank, no orphans, plain exit codes.

    icrl train (launcher)  ->  icrl_megatron.launch.agent  ->  ranks (icrl_megatron.train)

The ranks write their outcome to a small file that the launcher reads, so that there is one message, not one per rank.
The ranks' side, `run_rank` and `StopRequest`, also works under a plain torchrun.

Exit codes: 0 done; 1 failed; 2 ConfigError; 3 stopped on request after saving (the same command resumes); 130 killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

from icrl_megatron.distributed.process import (
    CONFIG_ERROR,
    HOPELESS,
    KILLED,
    OUTCOME_ENV,
    STARTED_ENV,
    STOP_ENV,
    read_outcome,
)
from icrl_megatron.utils import processes
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.parent_watch import PARENT_ENV
from icrl_megatron.utils.progress import Progress

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def launch(
    file: Path,
    ranks: int,
    log_dir: Path,
    module: str = "icrl_megatron.train",
    stop_timeout_s: float = 1800.0,
    stopping: str = "stopping: the ranks save first; Ctrl-C again ends them at once",
    computing: int = 1,
) -> int:
    """Runs `python -m MODULE FILE` in `ranks` processes and returns one of the exit codes above.

    Rank 0 writes to the terminal; the others write to files under `log_dir`, and the end of the first failed rank's
    file is printed. The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 reaches each rank as one SIGUSR1; the ranks have
    `stop_timeout_s` to save before they are killed. A second SIGINT kills them at once. `computing` is how many
    processes of a rank compute at the same time, with an equal share of the cores. Call it from the main thread.
    """
    with disk_errors(log_dir, "the logs of ranks"):
        log_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "icrl_megatron.launch.agent", f"--nproc-per-node={ranks}", f"--log-dir={log_dir}"]
    command += ["-m", module, str(file)]
    # Not on the run's disk, because ranks must be able to report that this disk is full.
    with tempfile.TemporaryDirectory(prefix="icrl_launch_") as control, _counting_signals() as received:
        outcome, stop, started = (Path(control) / name for name in ("outcome.json", "stop", "started"))
        # Own session: Ctrl-C in a terminal reaches only the launcher, which signals the ranks once.
        env = _environment(ranks * computing, outcome, stop, started)
        agent = subprocess.Popen(command, env=env, start_new_session=True)
        try:
            with _starting(ranks, started) as tick:
                killed = _wait(agent, received, stop, stop_timeout_s, stopping, tick)
        finally:
            processes.kill_tree(agent)
        return killed or _exit_code(agent.returncode, outcome)


def _environment(processes: int, outcome: Path, stop: Path, started: Path) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # More threads than cores would spend most of their time in busy waiting for each other.
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    ours = {OUTCOME_ENV: outcome, STOP_ENV: stop, STARTED_ENV: started, PARENT_ENV: os.getpid()}
    return {**defaults, **os.environ, **{name: str(value) for name, value in ours.items()}}


@contextlib.contextmanager
def _starting(ranks: int, started: Path) -> Iterator[Callable[[], None]]:
    """Shows a bar until the file `started` exists: importing torch and Megatron takes seconds without any output."""
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
    """Counts the stop signals by number instead of being killed by them; restores the previous handlers."""
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
    stopping: str,
    tick: Callable[[], None],
) -> int:
    """Waits for the agent and forwards one stop request. Returns 0 when it ends, or an exit code if the caller must
    kill it."""
    deadline = None
    while True:
        tick()
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(timeout=0.1)
            return 0
        if deadline is None and any(received.values()):
            deadline = time.monotonic() + stop_timeout_s
            stop.touch()
            with contextlib.suppress(psutil.NoSuchProcess):  # the agent has ended
                for rank in psutil.Process(agent.pid).children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        rank.send_signal(signal.SIGUSR1)
            print(stopping, file=sys.stderr)
        if received[signal.SIGINT] > 1:
            return KILLED
        if deadline is not None and time.monotonic() > deadline:
            print(f"error: the ranks did not stop within {stop_timeout_s:.0f} s and were killed", file=sys.stderr)
            return 1


def _exit_code(returncode: int, outcome: Path) -> int:
    left = read_outcome(outcome)
    if left is not None and left[0] in (CONFIG_ERROR, HOPELESS):
        print(f"error: {left[1]}", file=sys.stderr)
        return left[0]
    if returncode != 0:
        return CONFIG_ERROR if returncode == CONFIG_ERROR else 1
    return left[0] if left is not None else 0
