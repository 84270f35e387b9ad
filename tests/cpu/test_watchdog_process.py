"""The watchdog in a process of its own: code that never returns, Ctrl-C, and the end of the process."""

from __future__ import annotations

import signal
import subprocess
import sys

UNINTERRUPTIBLE = """
import sys, time
from icrl_megatron.rollout import watchdog
watchdog.LAST_RESORT_S = 0.5
def endless_c_code():
    return max(iter(int, 1))
try:
    watchdog.WATCHDOG.run(lambda: endless_c_code(), watchdog.Watched(0.2))
finally:
    print("interrupted")
"""


def test_c_code_that_never_returns_ends_the_process_with_its_name() -> None:
    done = subprocess.run([sys.executable, "-c", UNINTERRUPTIBLE], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGVTALRM, done
    assert "in endless_c_code" in done.stderr
    assert "interrupted" not in done.stdout


CTRL_C = """
import asyncio, os, signal, threading, time
from icrl_megatron.rollout.watchdog import WATCHDOG, Watched
def blocks():
    for seconds in (0.2, 0.6, 5.0, 10.0):  # asyncio only records the first; a busy machine may merge two
        sender = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        sender.daemon = True
        sender.start()
    time.sleep(3600)
async def main():
    with WATCHDOG.watching():
        WATCHDOG.run(lambda: blocks(), Watched(600.0))
asyncio.run(main())
"""


def test_ctrl_c_ends_blocking_code_and_the_program() -> None:
    done = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and done.stderr.endswith("KeyboardInterrupt\n")


def test_timer_stops_after_the_last_call() -> None:
    """Otherwise its signal would kill a process that is about to exit."""
    code = "from icrl_megatron.rollout.watchdog import WATCHDOG, Watched\n"
    code += "for _ in range(3): WATCHDOG.run(lambda: 1, Watched(60))\n"
    code += "import threading, time\nthreading.Thread(target=time.sleep, args=(2,)).start()\n"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
