"""How ranks find each other: over loopback if all are on one machine, otherwise at the job's static address.

The store of a job holds bytes and never unpickles them. Rank 0 serves it on the socket that the agent bound
(`icrl_megatron.launch.agent`), so that it listens on one address only; torch's own store listens on every interface.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import urllib.parse

import torch.distributed as dist

from icrl_megatron.distributed import net
from icrl_megatron.distributed.process import STORE_FD_ENV
from icrl_megatron.settings.schema import EngineSettings

_uses = itertools.count()
"""Phases of a job in one process (warm start, training, baseline) join one after another: each has its own keys."""


def store(timeout: datetime.timedelta) -> dist.Store:
    """The store for this job's process group; RANK, WORLD_SIZE and MASTER_* define its members."""
    if int(os.environ["WORLD_SIZE"]) == 1:
        return dist.HashStore()
    return dist.PrefixStore(f"icrl/{next(_uses)}", _shared(timeout))


@functools.cache
def _shared(timeout: datetime.timedelta) -> dist.Store:
    """Lives as long as the process: when rank 0 ends, the store ends for all ranks."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Under an external torchrun, its agent already serves the store.
    serves = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(
        address,
        port,
        int(os.environ["WORLD_SIZE"]),
        is_master=serves,
        timeout=timeout,
        master_listen_fd=_listening_fd(address, port) if serves else None,
    )


def _listening_fd(address: str, port: int) -> int:
    handed_over = os.environ.pop(STORE_FD_ENV, "")
    if not handed_over:
        return net.bound(address, port).detach()
    os.set_inheritable(int(handed_over), False)
    return int(handed_over)


def keep_to_this_machine(engine: EngineSettings) -> None:
    """If all ranks are on one machine, gloo and NCCL listen on loopback, whatever the environment says, because no
    other machine has to reach them. NCCL's interface is unchanged if weights go to servers elsewhere
    (`engine.urls`)."""
    world = os.environ["WORLD_SIZE"]
    if world != "1" and os.environ.get("LOCAL_WORLD_SIZE") != world:
        return
    os.environ["GLOO_SOCKET_IFNAME"] = net.loopback_interface()
    if all(net.is_loopback(urllib.parse.urlsplit(url).hostname or "") for url in engine.urls):
        os.environ["NCCL_SOCKET_IFNAME"] = net.loopback_interface()
