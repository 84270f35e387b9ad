"""`python parent_watch.py PARENT COMMAND...`: executes COMMAND, which Linux kills when PARENT dies, even by SIGKILL.

Runs as a file under whichever interpreter COMMAND needs, so it uses only the standard library. The parent must start it
from a thread that lives as long as COMMAND should, because the kernel watches the thread, not the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: str, *command: str) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != int(parent):
            os._exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
