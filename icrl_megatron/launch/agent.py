"""Starts the ranks of one machine, monitors them, and ends all of them if one fails. No torch.

    python -m icrl_megatron.launch.agent --nproc-per-node=8
        [--nnodes=2 --node-rank=0 --master-addr=HOST --master-port=PORT]
        [--log-dir=FOLDER] -m MODULE WORDS...

`icrl train` runs one agent on this machine, slurm/step.sh one on each node. The rendezvous has a static address: the
first node's agent binds it and passes the socket to rank 0, which serves the store (`distributed/rendezvous.py`). The
agent itself reads nothing from the network. Ranks get RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, as under torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from icrl_megatron.distributed import job_size, net
from icrl_megatron.distributed.process import (
    CONFIG_ERROR,
    HOPELESS,
    OUTCOME_ENV,
    STORE_FD_ENV,
    leave_outcome,
    read_outcome,
)
from icrl_megatron.utils import processes
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.parent_watch import PARENT_ENV, die_with_parent
from icrl_megatron.utils.terminal import guard

JOB_PROGRAM = "icrl_megatron.launch.rank"
TAIL_LINES = 40
END_TIMEOUT_S = 30.0
"""Between SIGTERM and SIGKILL, for the remaining ranks after one has failed."""
_POLL_S = 0.05
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class AgentShare:
    """This machine's part of a job."""

    nodes: int
    node: int
    """Index of this machine, from 0."""
    ranks: int
    """Processes on each machine."""
    address: str
    port: int
    """Port of the rendezvous; 0 selects a free one, on a single machine only."""
    log_dir: Path | None
    """Folder for the output of all ranks but this machine's first; if None, all ranks write to the agent's output."""
    module: str
    words: tuple[str, ...]

    @staticmethod
    def parse(arguments: Sequence[str]) -> AgentShare:
        """Exits with 2 and the usage if the arguments are invalid."""
        parser = argparse.ArgumentParser(prog="python -m icrl_megatron.launch.agent")
        parser.add_argument("--nnodes", type=int, default=1)
        parser.add_argument("--node-rank", type=int, default=0)
        parser.add_argument("--nproc-per-node", type=int, required=True)
        parser.add_argument("--master-addr", default="127.0.0.1")
        parser.add_argument("--master-port", type=int, default=0)
        parser.add_argument("--log-dir", type=Path)
        parser.add_argument("-m", dest="command", nargs=argparse.REMAINDER, required=True, metavar="MODULE WORDS...")
        read = parser.parse_args(arguments)
        if not read.command or read.nproc_per_node < 1 or not 0 <= read.node_rank < read.nnodes:
            parser.error("needs a module, at least one rank, and a --node-rank below --nnodes")
        if read.nnodes > 1 and read.master_port == 0:
            parser.error("several nodes need the same --master-port on each of them")
        module, *words = read.command
        where = (read.master_addr, read.master_port, read.log_dir)
        return AgentShare(read.nnodes, read.node_rank, read.nproc_per_node, *where, module, tuple(words))

    def environment(self, local: int, port: int) -> dict[str, str]:
        """Environment variables of local rank `local`; `port` is the store's port."""
        return {
            "RANK": str(self.node * self.ranks + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(self.nodes * self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(port),
        }


@dataclass(frozen=True)
class Rank:
    """One running rank."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path | None


def main(arguments: Sequence[str]) -> int:
    """Runs until all ranks have ended. Returns 0, 1 if a rank failed, 2 after a ConfigError that is not in the outcome
    file, or 128 + the number of the signal that ended the agent."""
    guard()
    # Ranks inherit this until they install their own handler, so that an early signal does not kill them.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    die_with_parent()
    received: list[int] = []
    for number in _STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # slurm/step.sh ignores the signal on which ranks save
            signal.signal(number, lambda number, frame: received.append(number))
    try:
        share = without_engine_ranks(AgentShare.parse(arguments))
    except ConfigError as error:
        leave_outcome(CONFIG_ERROR, str(error))
        return CONFIG_ERROR
    try:
        listener = _bound(share)
    except OSError as error:
        where = f"{share.address}:{share.port}"
        print(f"error: rank 0 cannot listen on {where} ({error.strerror}); set MASTER_ADDR to an address of the first "
              "node, or MASTER_PORT to a free port", file=sys.stderr)  # fmt: skip
        return 1
    try:
        ranks = _start(share, listener)
    except ConfigError as error:
        leave_outcome(CONFIG_ERROR, str(error))
        return CONFIG_ERROR
    failed = _watch(ranks, received)
    if received:
        return 128 + received[0]
    if failed is None:
        return 0
    return _explain(failed)


def without_engine_ranks(share: AgentShare) -> AgentShare:
    """The share with the ranks that train: in a job (`launch.rank`), --nproc-per-node counts those that the settings
    give to engines too (`launch.engine_ranks`), because a job knows only its GPUs. Raises ConfigError."""
    if share.module != JOB_PROGRAM or len(share.words) < 2:  # a job without a recipe: its ranks report that
        return share
    from icrl_megatron.settings import loading

    settings = loading.load(share.words[1], share.words[2:])
    return replace(share, ranks=job_size.training_of(settings, share.ranks))


def _explain(failed: Rank) -> int:
    """Prints how the first failed rank ended, unless the outcome file has its message; returns the exit code."""
    left = read_outcome(Path(os.environ[OUTCOME_ENV])) if OUTCOME_ENV in os.environ else None
    if left is not None and left[0] in (CONFIG_ERROR, HOPELESS):
        return 1
    if failed.process.returncode == CONFIG_ERROR:  # it could not write the outcome file, so it printed its message
        print(_tail(failed.log), end="", file=sys.stderr)
        return CONFIG_ERROR
    print(_report(failed), file=sys.stderr)
    return 1


def _bound(share: AgentShare) -> socket.socket | None:
    """The store's listening socket, on the first node; None on other nodes and for a single rank."""
    if share.node > 0 or share.nodes * share.ranks == 1:
        return None
    found = net.bound(share.address, share.port)
    if share.nodes > 1 and net.is_loopback(str(found.getsockname()[0])):
        # Debian's /etc/hosts maps a machine's own name to an address that other nodes cannot reach.
        found.close()
        found = net.bound("0.0.0.0", share.port)
    return found


def _start(share: AgentShare, listener: socket.socket | None) -> list[Rank]:
    port = listener.getsockname()[1] if listener is not None else share.port
    folder = None
    if share.log_dir is not None and share.ranks > 1:
        folder = share.log_dir / f"{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
        with disk_errors(folder, "the logs of ranks"):
            folder.mkdir(parents=True)
    command = [sys.executable, "-u", "-m", share.module, *share.words]
    ranks = []
    for local in range(share.ranks):
        env = {**os.environ, PARENT_ENV: str(os.getpid()), **share.environment(local, port)}
        handed_over: tuple[int, ...] = ()
        if listener is not None and local == 0:
            handed_over = (listener.fileno(),)
            env[STORE_FD_ENV] = str(listener.fileno())
        number = share.node * share.ranks + local
        log = folder / f"rank_{number}.log" if folder is not None and local > 0 else None
        with contextlib.ExitStack() as opened, disk_errors(share.log_dir or Path(), "the logs of ranks"):
            output = opened.enter_context(log.open("wb")) if log is not None else None
            # Own session: a rank's children end with it, and Ctrl-C reaches it only through the launcher.
            process = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, pass_fds=handed_over, start_new_session=True
            )
        ranks.append(Rank(number, process, log))
    if listener is not None:
        listener.close()
    return ranks


def _watch(ranks: Sequence[Rank], received: Sequence[int]) -> Rank | None:
    """Waits until all ranks have succeeded, one has failed, or a signal has arrived, and ends the remaining ranks.
    Returns the first failed rank."""
    try:
        running = list(ranks)
        while running and not received:
            failed = next((rank for rank in running if rank.process.poll()), None)
            if failed is not None:
                return failed
            running = [rank for rank in running if rank.process.returncode is None]
            time.sleep(_POLL_S)
        return None
    finally:
        left = [rank.process for rank in ranks if rank.process.poll() is None]
        for process in left:
            process.terminate()  # not its children, which it may need in order to save
        processes.wait_all(left, END_TIMEOUT_S)
        for process in left:
            if process.poll() is None:
                processes.kill_tree(process)


def _report(failed: Rank) -> str:
    code = int(failed.process.returncode)
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of memory?)"
    else:
        how = f"failed with exit code {code}"
    if failed.log is None:  # it wrote to the terminal
        return f"error: rank {failed.number} {how}; its messages are above"
    return f"{_tail(failed.log)}error: rank {failed.number} {how}; its whole output is in {failed.log}"


def _tail(log: Path | None) -> str:
    if log is None:
        return ""
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, TAIL_LINES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
