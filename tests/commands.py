"""Runs a program and waits until it has ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

Done = subprocess.CompletedProcess[str]


def run(*words: str | Path, **options: Any) -> Done:
    """The ended program, whatever its exit code, with its output as text. `options` are those of subprocess.run."""
    given = {"capture_output": True, "text": True, "check": False, "timeout": 300} | options
    return subprocess.run([str(word) for word in words], **given)


def python(*words: str | Path, **options: Any) -> Done:
    return run(sys.executable, *words, **options)
