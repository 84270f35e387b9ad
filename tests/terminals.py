"""Runs a command in a pseudo-terminal."""

from __future__ import annotations

import os
import subprocess


def in_a_terminal(command: list[str], timeout_s: float = 120, **more: str) -> str:
    """What a terminal gets as stdout and stderr of a command."""
    ours, theirs = os.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "100", **more}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    got = b""
    try:
        while piece := os.read(ours, 65536):
            got += piece
    except OSError:  # all who could write have ended
        pass
    finally:
        os.close(ours)
    process.wait(timeout=timeout_s)
    return got.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
