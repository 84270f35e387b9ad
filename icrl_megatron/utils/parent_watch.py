"""A process that ends with its parent, even if the parent is killed by SIGKILL.

`python parent_watch.py PARENT COMMAND...` executes COMMAND as such a process. It runs as a file under whichever
interpreter COMMAND needs, so this module uses only the standard library. The parent must start it from a thread that
lives as long as COMMAND should, because the kernel watches the thread, not the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_ENV = "ICRL_PARENT"
"""Process id of the parent that a child must not outlive."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Asks Linux to send this process a signal when its parent dies; exits if the parent is already dead."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # Removed, so that a child of this process does not compare it with its own parent.
    parent = os.environ.pop(PARENT_ENV, "")
    if parent and os.getppid() != int(parent):
        os._exit(1)


if __name__ == "__main__":
    os.environ[PARENT_ENV] = sys.argv[1]
    die_with_parent()
    os.execvp(sys.argv[2], sys.argv[2:])
