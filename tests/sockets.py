"""Samples the listening sockets of a process tree, as the kernel reports them."""

from __future__ import annotations

import ipaddress
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from icrl_megatron.distributed import net
from icrl_megatron.utils import processes

_LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""
_PERIOD_S = 0.05


@dataclass(frozen=True, order=True)
class Listener:
    """One listening TCP socket."""

    address: str
    port: int
    command: str
    """Beginning of the command line of its process."""

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return net.is_loopback(self.address)


@dataclass
class Watch:
    """Samples the listening sockets of `pid` and its descendants until the block ends; `found` has all of them."""

    pid: int
    found: set[Listener] = field(default_factory=set)
    samples: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self.found |= listeners(self.pid)
            self.samples += 1

    def beyond_loopback(self) -> list[Listener]:
        return sorted(one for one in self.found if not one.local)


def listeners(pid: int) -> set[Listener]:
    """The current listening TCP sockets of a process and its descendants."""
    table = _table()
    found = set()
    for process in processes.tree(pid):
        for inode in _inodes(process.pid) & table.keys():
            found.add(Listener(*table[inode], _command(process)))
    return found


def _table() -> dict[str, tuple[str, int]]:
    """The kernel's listening TCP sockets by inode."""
    found = {}
    for name in ("tcp", "tcp6"):
        path = Path("/proc/net") / name
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            words = line.split()
            if words[3] == _LISTEN:
                address, port = words[1].split(":")
                found[words[9]] = (_address(address), int(port, 16))
    return found


def _address(words: str) -> str:
    """Parses an address: the kernel prints each 32-bit word in the machine's byte order."""
    parts = [bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8)]
    return str(ipaddress.ip_address(b"".join(parts)))


def _inodes(pid: int) -> set[str]:
    found = set()
    try:
        for entry in (Path("/proc") / str(pid) / "fd").iterdir():
            try:
                target = str(entry.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:  # it has ended
        pass
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return "?"
