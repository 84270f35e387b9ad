"""Transfers weights, or their differences, to a server on any machine over a process group of trainer and server.

Whole tensors are broadcast to SGLang's update_weights_from_distributed. That has no custom loaders, so differences are
announced to update_weights_from_tensor, and the loader there receives the broadcast (`on_server/icrl_deltas.py`). Facts
are from SGLang 0.5.23.
"""

from __future__ import annotations

import base64
import datetime
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from icrl_megatron.distributed import net
from icrl_megatron.engines.on_server import icrl_deltas
from icrl_megatron.engines.protocol import EngineError, NoAnswerError
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.engines.sglang_weights import Answer, Bucket, asked, refuse


class OverGroup:
    """For a server on any machine: gloo between CPUs, NCCL between GPUs (which must not be shared with the server)."""

    def __init__(self, server: Server, workers: int, host: str, device: torch.device, timeout_s: float) -> None:
        """`host` is the address at which the server's workers reach this rank."""
        self._server, self._timeout_s = server, timeout_s
        self._workers, self._host, self._on_cpu = workers, host, device.type == "cpu"
        self._threads = ThreadPoolExecutor(1)
        self._group: Any = None
        self._name = ""

    def begin(self, lost: str) -> Answer:
        """Forms the group at first use. Raises EngineError."""
        if lost:
            return partial(refuse, lost)
        if self._group is None:
            self._form()
        return asked(self._threads, self._server, "/begin_weight_update", {}, self._timeout_s)

    def _form(self) -> None:
        """This rank is rank 0 of the group; the server's workers are 1 and up."""
        listener = net.bound(self._host)  # only on the address at which the server's workers reach this rank
        port = listener.getsockname()[1]
        size, backend = self._workers + 1, "gloo" if self._on_cpu else "nccl"
        self._name = f"icrl_weights_{port}"
        body = {
            "master_address": self._host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": size,
            "group_name": self._name,
            "backend": backend,
        }
        limit = datetime.timedelta(seconds=self._timeout_s)
        answer = asked(self._threads, self._server, "/init_weights_update_group", body, self._timeout_s)
        try:
            store = dist.TCPStore(
                self._host,
                port,
                size,
                is_master=True,
                timeout=limit,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
            with gloo_on(self._host):
                # torch has no public API for a group with processes outside its own world; the server does the same.
                group, _ = c10d._new_process_group_helper(
                    size,
                    0,
                    [],
                    dist.Backend(backend),
                    dist.PrefixStore(self._name, store),
                    group_name=c10d.GroupName(self._name),
                    timeout=limit,
                )
        except (RuntimeError, ValueError) as error:
            # The run's own server may have died: it is restarted. An external one cannot be.
            kind = EngineError if self._server.spec is None else NoAnswerError
            raise kind(
                f"No group for weights could be formed with {self._server.url} from {self._host}:{port} ({error}). "
                "Each must reach the other at any port: open all ports between them, and if the server's host has "
                "several networks, start it with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME naming the one between them. "
                f"{self._server.log_end()}"
            ) from error
        c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
        answer()
        self._group = group

    def send(self, bucket: Bucket, options: dict[str, Any]) -> Answer:
        body = {
            "names": [p.name for p in bucket.placed],
            "dtypes": [str(p.dtype).removeprefix("torch.") for p in bucket.placed],
            "shapes": [list(p.shape) for p in bucket.placed],
            "group_name": self._name,
            **options,
        }
        answer = asked(self._threads, self._server, "/update_weights_from_distributed", body, self._timeout_s)
        return self._with(answer, [tensor for _, tensor in bucket.tensors(bucket.placed)])

    def send_pieces(self, pieces: Sequence[icrl_deltas.DeltaPiece], data: Tensor, options: dict[str, Any]) -> Answer:
        """Sends differences of weights to a server that was started with the loader. `data` has the bytes of the
        pieces, on the device of the group."""
        # SGLang wants tensors with the names; the message is the name of an empty one.
        handle = pickle.dumps([(icrl_deltas.message(self._name, pieces), torch.empty(0))])
        body = {
            "serialized_named_tensors": [base64.b64encode(handle).decode()] * self._workers,
            "load_format": icrl_deltas.LOADER,
            **options,
        }
        answer = asked(self._threads, self._server, "/update_weights_from_tensor", body, self._timeout_s)
        return self._with(answer, [data] if len(data) else [])

    def _with(self, answer: Answer, tensors: list[Tensor]) -> Answer:
        """Broadcasts the tensors while the server answers."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        with self._sending():
            works = [self._group.broadcast([tensor], options) for tensor in tensors]

        def wait() -> None:
            with self._sending():
                for work in works:
                    work.wait()
            answer()

        return wait

    @contextmanager
    def _sending(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise NoAnswerError(f"Weights could not be sent to {self._server.url}: {error}") from error

    def close(self) -> None:
        if self._group is not None:
            with suppress(EngineError):  # the server and the group may be gone
                self._server.post("/destroy_weights_update_group", {"group_name": self._name}, 30.0)
            # With NCCL, a broadcast to a server that died would block the GPU for good.
            self._group.abort()
            c10d._world.pg_group_ranks.pop(self._group, None)
        self._threads.shutdown(wait=False)


@contextmanager
def gloo_on(address: str) -> Iterator[None]:
    """A gloo group formed in this context uses the interface of this address. Otherwise it would use the interface that
    the ranks share, which is the loopback in a run on one machine."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    named = [name for name, has in psutil.net_if_addrs().items() if any(a.address == address for a in has)]
    if named:
        os.environ["GLOO_SOCKET_IFNAME"] = named[0]
    try:
        yield
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        if before is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = before
