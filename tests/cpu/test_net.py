"""Sockets that are bound to one address, and the network interface that ranks use."""

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
def test_store_on_a_bound_socket_listens_only_there(address: str) -> None:
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
    own = [one for one in listeners(os.getpid()) if one.port == port]
    assert len(own) == 1 and own[0].local, own


def test_store_without_a_bound_socket_listens_on_all_interfaces() -> None:
    """This is why we bind the socket ourselves."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=20))
    (own,) = [one for one in listeners(os.getpid()) if one.port == store.port]
    assert not own.local


def test_binding_to_another_machines_address_fails() -> None:
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
def test_is_loopback(host: str, expected: bool) -> None:
    assert net.is_loopback(host) == expected
    if host and host[0] in "0123456789:":
        assert Listener(host.partition("%")[0], 1, "").local == expected


def test_loopback_interface_exists() -> None:
    assert net.loopback_interface() in [name for _, name in socket.if_nameindex()]


@pytest.mark.parametrize(
    ("world", "here", "urls", "gloo", "nccl"),
    [
        ("1", None, [], True, True),
        ("4", "4", [], True, True),
        ("4", "2", [], False, False),  # two nodes
        ("4", None, [], False, False),  # number of local ranks unknown
        ("2", "2", ["http://127.0.0.1:1", "http://localhost:2"], True, True),
        ("2", "2", ["http://127.0.0.1:1", "http://engine:2"], True, False),  # weights are sent to that server over NCCL
    ],
)
def test_ranks_on_one_machine_use_loopback(
    world: str, here: str | None, urls: list[str], gloo: bool, nccl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "ib0")  # as a cluster's profile may set it
    rendezvous.keep_to_this_machine(EngineSettings(kind="sglang", urls=urls))
    found = [os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
    assert found == [net.loopback_interface() if kept else "ib0" for kept in (gloo, nccl)]
