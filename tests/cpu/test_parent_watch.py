"""A server must not outlive the rank that started it, however the rank ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from icrl_megatron.utils import parent_watch

PARENT_WATCH = Path(parent_watch.__file__)
PARENT = f"""
import os, subprocess, sys
command = [sys.executable, {str(PARENT_WATCH)!r}, str(os.getpid()), "sleep", "60"]
print(subprocess.Popen(command, start_new_session=True).pid, flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_child_ends_with_its_parent(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.send_signal(number)
        parent.wait(timeout=20)
        assert psutil.wait_procs([child], timeout=20)[1] == []


def test_child_is_not_started_after_its_parent_ended() -> None:
    done = subprocess.run([sys.executable, str(PARENT_WATCH), "1", "echo", "started"], capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, b"")
