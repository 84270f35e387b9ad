"""Signals and ends child processes with everything that they started.

Children that are to be ended as a group are started with `start_new_session=True`: their id is then that of the group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import psutil


def tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants, the process first; empty if it does not exist."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def signal_group(group: int, number: signal.Signals) -> None:
    """Signals every process of a group; does nothing if there is none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def wait_all(processes: Sequence[subprocess.Popen[Any]], timeout_s: float) -> None:
    """Returns when all of them have ended, or after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def end_groups(processes: Sequence[subprocess.Popen[Any]], grace_s: float) -> None:
    """Sends SIGTERM to the groups that these children lead, and SIGKILL when the children have ended, or after
    `grace_s`."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            signal_group(process.pid, number)
        wait_all(processes, grace_s)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kills a child, the group that it leads if it leads one, and all its descendants, and reaps the child. Raises
    TimeoutExpired if it is still there after a minute."""
    below = tree(process.pid)
    signal_group(process.pid, signal.SIGKILL)
    for one in below:  # in case one left the group
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(60)
