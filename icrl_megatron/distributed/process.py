"""A rank's process: it dies with its parent, handles stop requests, and reports how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from icrl_megatron.utils.disk import unexplained_errors
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.parent_watch import die_with_parent
from icrl_megatron.utils.terminal import guard

HOPELESS = 1
CONFIG_ERROR = 2
STOPPED = 3
KILLED = 130
OUTCOME_ENV = "ICRL_OUTCOME"
"""File to which the first rank with an outcome writes {"code", "message"}; the caller of the agent may set it."""
STOP_ENV = "ICRL_STOP"
"""File whose existence requests a stop: a signal that arrives before a rank listens would be lost, and in a container
it may kill the process that serves the file system (slurm/job.sh)."""
STARTED_ENV = "ICRL_STARTED"
"""File that rank 0 creates when all ranks have joined: from then on rank 0 writes to the terminal."""
STORE_FD_ENV = "ICRL_STORE_FD"
"""Descriptor of the bound socket on which rank 0 serves the job's store."""
LEAVE_TIMEOUT_S = 30.0
"""Maximum time from the end of a rank's work to the end of its process."""


def is_rank() -> bool:
    """Whether this process already is a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def require_gpu(device: str) -> None:
    """Raises ConfigError if `launch.device` is cuda and this machine has no GPU that the process may use. Looks for
    device files only, and so takes no time; `platform.prepare` asks torch."""
    if device != "cuda":
        return
    names = ("nvidia[0-9]*", "kfd", "dxg")  # NVIDIA, AMD, Windows' Linux
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if hidden or not any(path for name in names for path in Path("/dev").glob(name)):
        found = "CUDA_VISIBLE_DEVICES hides all GPUs" if hidden else "this machine has no GPU"
        raise ConfigError(
            f"launch.device=cuda: {found}; run this where there is one (docs/CLUSTER.md), check the settings here with "
            "--dry-run, or try a recipe for CPUs: icrl train quickstart"
        )


def run_rank(main: Callable[[], int]) -> NoReturn:
    """Runs a rank's `main`: the process dies with its parent, and writes its outcome for the launcher.

    `main` returns 0, or STOPPED when all ranks agreed to stop. The process exits with 0 in both cases, because the
    agent ends the other ranks as soon as one exits otherwise; with 2 after a ConfigError and 1 after a HopelessError,
    whose messages need no traceback.
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
    """Ends the process, and waits at most LEAVE_TIMEOUT_S for threads that an environment may have left running."""
    # Python restores default signal handlers while it exits: a stop request at that time would kill the rank.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    last = threading.Timer(LEAVE_TIMEOUT_S, os._exit, [code])
    last.daemon = True
    last.start()
    sys.exit(code)


def report_started() -> None:
    """Reports that rank 0 writes to the terminal from now on, if the launcher requested the report."""
    if os.environ.get(STARTED_ENV):
        Path(os.environ[STARTED_ENV]).touch()


class StopRequest:
    """Whether this rank was asked to stop. Only a flag: the loop agrees on it with all ranks between two steps."""

    def __init__(self) -> None:
        """Starts listening for SIGUSR1 and SIGTERM; call it in the main thread, before anything slow."""
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


def read_outcome(path: Path) -> tuple[int, str] | None:
    """(exit code, message) that a rank wrote; None if none did."""
    try:
        left = json.loads(path.read_text(encoding="utf-8"))
        return int(left["code"]), str(left["message"])
    except FileNotFoundError:
        return None


def leave_outcome(code: int, message: str) -> None:
    """Writes how this rank ended to the file that the launcher named; the first rank to write wins. Prints an error if
    no file was named or it cannot be written."""
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
