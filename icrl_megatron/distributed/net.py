"""Sockets bound to one address, and to loopback if the run uses one machine. No torch."""

from __future__ import annotations

import ipaddress
import socket

import psutil


def bound(address: str, port: int = 0) -> socket.socket:
    """A TCP socket bound only to `address` (a name or a number); it does not listen yet.

    torch's TCPStore listens on every interface unless it is given such a socket (`master_listen_fd`). Port 0 takes a
    free one. Raises OSError.
    """
    family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    try:
        # A restarted job uses the port of its predecessor, whose connections linger for a minute.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(where)
    except OSError:
        found.close()
        raise
    return found


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port that is free at `address` now; another program may take it before it is used."""
    with bound(address) as probe:
        return int(probe.getsockname()[1])


def is_loopback(host: str) -> bool:
    """Whether a host name or address is the loopback of this machine."""
    if host == "localhost":
        return True
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def loopback_interface() -> str:
    """Name of the loopback interface: lo on Linux."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return "lo"
