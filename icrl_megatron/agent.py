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

from icrl_megatron.launch import CONFIG_ERROR, HOPELESS, OUTCOME_ENV, PARENT_ENV, die_with_parent, read_outcome

TAIL_LINES = 40


def main(arguments: list[str]) -> int:
    """Runs until all ranks ended. Returns 0, 1 when a rank failed, or 128 + the number of the signal that ended it."""
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
        elastic_launch(config=config, entrypoint=command)(*rest)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        assert isinstance(failure, ProcessFailure)
        left = read_outcome(Path(os.environ[OUTCOME_ENV])) if OUTCOME_ENV in os.environ else None
        if left is None or left[0] not in (CONFIG_ERROR, HOPELESS):
            print(_report(rank, failure.exitcode, Path(parsed.log_dir)), file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _report(rank: int, exitcode: int, log_dir: Path) -> str:
    if exitcode < 0:
        how = f"was killed by {signal.Signals(-exitcode).name}"
        if exitcode == -signal.SIGKILL:
            how += " (out of memory?)"
    else:
        how = f"failed with exit code {exitcode}"
    logs = sorted(log_dir.glob(f"*/attempt_0/{rank}/stderr.log"), key=lambda path: path.stat().st_mtime)
    if not logs:  # rank 0 has written to the terminal itself
        return f"error: rank {rank} {how}; its messages are above"
    with logs[-1].open(encoding="utf-8", errors="replace") as file:
        tail = "".join(deque(file, TAIL_LINES))
    return f"{tail}error: rank {rank} {how}; its whole output is in {logs[-1].parent}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
