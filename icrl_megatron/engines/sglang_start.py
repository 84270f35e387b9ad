"""`python sglang_start.py ARGUMENTS...`: starts an SGLang server whose API key appears in no command line and no log.

Does what `python -m sglang.launch_server ARGUMENTS` does. Runs as a file under the interpreter that has SGLang, so it
uses only the standard library. The key comes from the environment, which the kernel shows only to the same user, and is
passed to SGLang inside this process.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from pathlib import Path

KEY_ENV = "ICRL_ENGINE_KEY"
MODULE = "sglang.launch_server"


def hide(key: str) -> None:
    """Replaces the key by *** in all later log records of this process: SGLang 0.5.23 logs its whole configuration when
    it starts (entrypoints/engine.py)."""
    make = logging.getLogRecordFactory()

    def hiding(*args: object, **named: object) -> logging.LogRecord:
        record = make(*args, **named)
        if key in str(record.msg) or key in str(record.args):
            record.msg, record.args = record.getMessage().replace(key, "***"), ()
        return record

    logging.setLogRecordFactory(hiding)


def main(arguments: list[str]) -> None:
    key = os.environ.pop(KEY_ENV)
    hide(key)
    # Python puts this file's folder first in sys.path, and it has modules with the names of SGLang's own.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    sys.argv = [MODULE, *arguments, f"--api-key={key}"]  # a key may begin with a dash
    # As `python -m` does: SGLang's workers import the same main module.
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
