"""Sockets that are bound to one address, and which interface ranks may use."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist
from sockets import Listener, listeners

from icrl_megatron.distributed import net, rendezvous
from icrl_megatron.settings.schema import EngineSettings


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "::1"])
def test_a_store_on_a_bound_socket_listens_there_and_nowhere_else(address: str) -> None:
    try:
        bound = net.bound(address)
    except OSError:
        pytest.skip(f"this machine has no {address}")
    port = bound.getsockname()[1]
    store = dist.TCPStore(
        address, port, 1, is_master=True, timeout=timedelta(seconds=20), master_listen_fd=bound.detach()
    )
    store.set("key", "value")
    with pytest.raises(OSError, match="in use"):
        net.bound(address, port)
    mine = [one for one in listeners(os.getpid()) if one.port == port]
    assert len(mine) == 1 and mine[0].local, mine


def test_what_torch_does_without_one() -> None:
    """Else the socket would not be needed."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=20))
    (mine,) = [one for one in listeners(os.getpid()) if one.port == store.port]
    assert not mine.local


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(OSError):
        net.bound("192.0.2.1")
    with pytest.raises(OSError):
        net.bound("nowhere.invalid")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.0.1.1", True), ("::1", True), ("localhost", True), ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("fe80::1%eth0", False), ("node0", False), ("", False),
    ],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert net.is_loopback(host) == expected
    if host and host[0] in "0123456789:":
        assert Listener(host.partition("%")[0], 1, "").local == expected


def test_the_loopback_interface_has_its_address() -> None:
    assert net.loopback_interface() in [name for _, name in socket.if_nameindex()]


@pytest.mark.parametrize(
    ("world", "here", "urls", "gloo", "nccl"),
    [
        ("1", None, [], True, True),
        ("4", "4", [], True, True),
        ("4", "2", [], False, False),  # two nodes
        ("4", None, [], False, False),  # nobody says
        ("2", "2", ["http://127.0.0.1:1", "http://localhost:2"], True, True),
        ("2", "2", ["http://127.0.0.1:1", "http://engine:2"], True, False),  # weights go there over NCCL
    ],
)
def test_ranks_of_one_machine_speak_over_loopback(
    world: str, here: str | None, urls: list[str], gloo: bool, nccl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "ib0")  # as a cluster's profile may say
    rendezvous.keep_to_this_machine(EngineSettings(kind="sglang", urls=urls))
    found = [os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
    assert found == [net.loopback_interface() if kept else "ib0" for kept in (gloo, nccl)]
