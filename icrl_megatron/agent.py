"""torchrun, as the launcher starts it: the same arguments, but quiet, deaf to SIGUSR1 and not outliving its parent.

`python -m icrl_megatron.agent ARGUMENTS` is `torchrun ARGUMENTS`, without --standalone, with a short report of the rank
that failed first in place of torchrun's own traceback.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import deque
from pathlib import Path

from icrl_megatron.config import ConfigError
from icrl_megatron.launch import (
    CONFIG_ERROR,
    HOPELESS,
    OUTCOME_ENV,
    PARENT_ENV,
    die_with_parent,
    leave_outcome,
    read_outcome,
)
from icrl_megatron.telemetry.disk import disk_errors

TAIL_LINES = 40


def main(arguments: list[str]) -> int:
    """Runs until all ranks ended. Returns 0, 1 when a rank failed, 2 after a ConfigError that the outcome file does not
    hold, or 128 + the number of the signal that ended it."""
    # Ranks inherit it until they listen themselves, so an early signal kills none of them.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    die_with_parent()
    os.environ[PARENT_ENV] = str(os.getpid())

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    parsed = parse_args(arguments)
    # torchrun's own parser of --redirects reads ranks of one digit only.
    redirects, parsed.redirects = parsed.redirects, "0"
    config, command, rest = config_from_args(parsed)
    if ":" in redirects:
        pairs = (pair.split(":") for pair in redirects.split(","))
        by_rank = {int(rank): Std(int(streams)) for rank, streams in pairs}
        config.logs_specs = DefaultLogsSpecs(log_dir=parsed.log_dir, redirects=by_rank)
    try:
        with disk_errors(Path(parsed.log_dir), "the logs of ranks"):
            elastic_launch(config=config, entrypoint=command)(*rest)
    except ConfigError as error:
        leave_outcome(CONFIG_ERROR, str(error))
        return CONFIG_ERROR
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        assert isinstance(failure, ProcessFailure)
        return _failed(rank, failure.exitcode, Path(parsed.log_dir))
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _failed(rank: int, exitcode: int, log_dir: Path) -> int:
    """Says how the rank that failed first ended, unless its message is known already; returns our exit code."""
    left = read_outcome(Path(os.environ[OUTCOME_ENV])) if OUTCOME_ENV in os.environ else None
    if left is not None and left[0] in (CONFIG_ERROR, HOPELESS):
        return 1
    if exitcode == CONFIG_ERROR:  # it could not leave its message, so it printed it
        print(_tail(_logs(rank, log_dir)), end="", file=sys.stderr)
        return CONFIG_ERROR
    print(_report(rank, exitcode, log_dir), file=sys.stderr)
    return 1


def _report(rank: int, exitcode: int, log_dir: Path) -> str:
    if exitcode < 0:
        how = f"was killed by {signal.Signals(-exitcode).name}"
        if exitcode == -signal.SIGKILL:
            how += " (out of memory?)"
    else:
        how = f"failed with exit code {exitcode}"
    log = _logs(rank, log_dir)
    if log is None:  # rank 0 has written to the terminal itself
        return f"error: rank {rank} {how}; its messages are above"
    return f"{_tail(log)}error: rank {rank} {how}; its whole output is in {log.parent}"


def _logs(rank: int, log_dir: Path) -> Path | None:
    """What the rank has written to stderr; None for rank 0."""
    found = log_dir.glob(f"*/attempt_0/{rank}/stderr.log")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _tail(log: Path | None) -> str:
    if log is None:
        return ""
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, TAIL_LINES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
