"""Checks whether bubblewrap works here, without our sandbox: errors of the sandbox must fail tests, not skip them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from icrl_megatron.utils.sandbox import SandboxLimits

LIMITS = SandboxLimits(cpu_s=2.0, memory_bytes=256 << 20)


def why_not() -> str:
    """Why bubblewrap cannot create namespaces here; empty if it can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    empty = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    done = subprocess.run(empty, capture_output=True, text=True, timeout=60, check=False)
    return f"bubblewrap cannot create namespaces here: {done.stderr.strip()}" if done.returncode else ""


REASON = why_not()
sandboxed = pytest.mark.skipif(bool(REASON), reason=REASON)
