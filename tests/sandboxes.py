"""Whether bubblewrap works on this machine, asked without our sandbox, whose faults must fail and not skip tests."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from icrl_megatron.tasks.sandbox import SandboxLimits

LIMITS = SandboxLimits(cpu_s=2.0, memory_bytes=256 << 20)


def why_not() -> str:
    """Why bubblewrap can make no namespaces here; empty when it can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    empty = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    done = subprocess.run(empty, capture_output=True, text=True, timeout=60, check=False)
    return f"bubblewrap makes no namespaces here: {done.stderr.strip()}" if done.returncode else ""


REASON = why_not()
sandboxed = pytest.mark.skipif(bool(REASON), reason=REASON)
