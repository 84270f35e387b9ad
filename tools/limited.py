"""Runs a command with a time limit, in a session of its own that is killed as a whole.

Only the standard library: tools/gpu_check.py imports it under a Python in which this project is not installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_S = 10.0
"""Between SIGTERM, on which a launcher ends its ranks and servers, and SIGKILL."""


def run(
    command: Sequence[str],
    limit_s: float,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: int | None = None,
    grace_s: float = GRACE_S,
) -> int | None:
    """The exit code, or None if the limit ended it. No child of the command survives, so none keeps the GPU.

    `output` is the file descriptor for stdout and stderr; None: this process's own.
    """
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        return None
    finally:
        _signal(process.pid, signal.SIGKILL)
        process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
