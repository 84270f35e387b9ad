"""Runs a command with a time limit, in a session of its own that is killed as a whole."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from icrl_megatron.utils import processes

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
        return None
    finally:
        processes.end_groups([process], grace_s)
