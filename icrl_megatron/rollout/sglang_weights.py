"""How weights reach an SGLang server: flattened buckets of bounded size, by shared memory or over a process group.

A bucket is one buffer of bytes that holds several tensors end to end, and where each lies. Beside the trainer the
server maps the buffer itself: shared memory on a CPU, CUDA IPC on a GPU (SGLang's update_weights_from_tensor).
Elsewhere its tensors are broadcast over a group that trainer and server form (update_weights_from_distributed). Facts
are from SGLang 0.5.23: managers/scheduler_components/weight_updater.py, weight_sync/tensor_bucket.py, and SafeUnpickler
in utils/common.py.
"""

from __future__ import annotations

import base64
import datetime
import io
import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from icrl_megatron.rollout.engine import EngineError
from icrl_megatron.rollout.sglang_server import Server

_ALIGN = 16
"""Bytes: a tensor begins where any dtype may be viewed."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in a bucket, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


class Bucket:
    """A buffer that is filled again and again: the receiver has copied what was in it before it answers."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        with _by_name():
            self.buffer = torch.empty(capacity, dtype=torch.uint8, device=device)
            if device.type == "cpu":
                self.buffer.share_memory_()
        self.placed: list[Placed] = []
        self.used = 0

    def add(self, name: str, tensor: Tensor) -> bool:
        """Copies the tensor in; False when there is no room left."""
        start = -(-self.used // _ALIGN) * _ALIGN
        end = start + tensor.nbytes
        if end > self.buffer.numel():
            return False
        self.buffer[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self.placed.append(Placed(name, tuple(tensor.shape), tensor.dtype, start, end))
        self.used = end
        return True

    def clear(self) -> None:
        self.placed, self.used = [], 0

    def handle(self) -> bytes:
        """What SGLang unpickles: the buffer's handle, not its bytes, and the places."""
        if self.buffer.is_cuda:
            torch.cuda.synchronize()  # the receiver's stream knows nothing of ours
        places = [
            # SGLang reads attributes, and its unpickler knows this class; the trainer need not have SGLang.
            SimpleNamespace(
                name=p.name,
                shape=torch.Size(p.shape),
                dtype=p.dtype,
                start_idx=p.start,
                end_idx=p.end,
                numel=p.end - p.start,
            )
            for p in self.placed
        ]
        out = io.BytesIO()
        with _by_name():
            ForkingPickler(out).dump({"flattened_tensor": self.buffer[: self.used], "metadata": places})
        return out.getvalue()


class Transport(Protocol):
    """Hands one bucket to a server and returns when the server has copied it. All ranks of the server call together."""

    def send(self, bucket: Bucket, options: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class SharedMemory:
    """For a server on this machine: every rank of it gets a handle to a buffer on its own device.

    `group` holds the ranks that share the server (None for one rank alone); the first of them leads. On GPUs each rank
    makes a buffer of its own, so that no worker reads another GPU's memory. Not measured on GPUs yet.
    """

    def __init__(self, server: Server | None, workers: int, group: Any, lead: int, timeout_s: float) -> None:
        """`lead` is the rank that has the `server`."""
        self._server, self._workers, self._group = server, workers, group
        self._lead, self._timeout_s = lead, timeout_s

    def send(self, bucket: Bucket, options: dict[str, Any]) -> None:
        mine = bucket.handle()
        if self._group is None or not bucket.buffer.is_cuda:
            self._post([mine] * self._workers, options)
            return
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, mine, group=self._group)
        failure = [""]
        if self._server is not None:
            try:
                self._post(everyone[: self._workers], options)
            except EngineError as error:
                failure = [str(error)]
        # The buffers stay as they are until the server has answered, and all ranks give up together.
        dist.broadcast_object_list(failure, src=self._lead, group=self._group)
        if failure[0]:
            raise EngineError(failure[0])

    def _post(self, handles: list[bytes], options: dict[str, Any]) -> None:
        assert self._server is not None
        body = {
            "serialized_named_tensors": [base64.b64encode(h).decode() for h in handles],
            "load_format": "flattened_bucket",
            **options,
        }
        self._server.post("/update_weights_from_tensor", body, self._timeout_s)

    def close(self) -> None:
        pass


class OverGroup:
    """For a server anywhere: gloo between CPUs, NCCL between GPUs (which must not be shared with the server)."""

    def __init__(self, server: Server, workers: int, host: str, device: torch.device, timeout_s: float) -> None:
        """Forms the group: this rank is 0, the server's workers are 1 and up. Raises EngineError."""
        from torch.distributed import distributed_c10d as c10d

        self._server, self._timeout_s = server, timeout_s
        self._threads = ThreadPoolExecutor(1)
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        self._name = f"icrl_weights_{port}"
        backend = "gloo" if device.type == "cpu" else "nccl"
        body = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": workers + 1,
            "group_name": self._name,
            "backend": backend,
        }
        limit = datetime.timedelta(seconds=timeout_s)
        answer = self._threads.submit(server.post, "/init_weights_update_group", body, timeout_s)
        try:
            store = dist.TCPStore(host, port, workers + 1, is_master=True, timeout=limit, wait_for_workers=False)
            # torch has no public way to form a group with processes outside of its own; the server does the same.
            self._group, _ = c10d._new_process_group_helper(
                workers + 1,
                0,
                [],
                dist.Backend(backend),
                dist.PrefixStore(self._name, store),
                group_name=c10d.GroupName(self._name),
                timeout=limit,
            )
        except (RuntimeError, ValueError) as error:
            raise EngineError(
                f"No group for weights could be formed with {server.url} from {host}:{port} ({error}). The server "
                f"must reach this address: set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME. {server.log_end()}"
            ) from error
        c10d._world.pg_group_ranks[self._group] = {i: i for i in range(workers + 1)}
        answer.result()

    def send(self, bucket: Bucket, options: dict[str, Any]) -> None:
        body = {
            "names": [p.name for p in bucket.placed],
            "dtypes": [str(p.dtype).removeprefix("torch.") for p in bucket.placed],
            "shapes": [list(p.shape) for p in bucket.placed],
            "group_name": self._name,
            **options,
        }
        answer = self._threads.submit(self._server.post, "/update_weights_from_distributed", body, self._timeout_s)
        try:
            works = [self._broadcast(bucket, place) for place in bucket.placed]
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise EngineError(f"Weights could not be sent to {self._server.url}: {error}") from error
        answer.result()

    def _broadcast(self, bucket: Bucket, place: Placed) -> Any:
        tensor = bucket.buffer[place.start : place.end].view(place.dtype).view(place.shape)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._group.broadcast([tensor], options)

    def close(self) -> None:
        with suppress(EngineError):  # the server may be gone, and the group with it
            self._server.post("/destroy_weights_update_group", {"group_name": self._name}, 30.0)
        self._threads.shutdown(wait=False)


def buckets(tensors: Iterable[tuple[str, Tensor]], bucket: Bucket) -> Iterator[None]:
    """Fills the bucket with tensor after tensor and yields whenever it must be sent; it is empty afterwards."""
    bucket.clear()
    for name, tensor in tensors:
        if not bucket.add(name, tensor):
            yield
            bucket.clear()
            if not bucket.add(name, tensor):
                raise EngineError(f"{name!r} has {tensor.nbytes} bytes, more than the buffer's {bucket.buffer.numel()}")
    if bucket.placed:
        yield


def capacity(shapes: Shapes, itemsize: int, bucket_mib: int) -> int:
    """Bytes of a buffer that holds the largest tensor, and no more than all of them need."""
    sizes = [torch.Size(s).numel() * itemsize + _ALIGN for s in shapes.values()]
    return max(max(sizes), min(sum(sizes), bucket_mib << 20))


def checked(
    tensors: Iterable[tuple[str, Tensor]], shapes: Shapes, dtype: torch.dtype, version: int
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, once each was found to be one of the model's: a malformed update would kill the server.

    Raises EngineError naming the first bad one, and on names that never came.
    """
    seen: set[str] = set()
    for name, tensor in tensors:
        if name not in shapes:
            raise EngineError(f"Update {version}: the model has no tensor {name!r}.")
        if name in seen:
            raise EngineError(f"Update {version}: {name!r} came twice.")
        if tuple(tensor.shape) != shapes[name]:
            raise EngineError(
                f"Update {version}: {name!r} has shape {tuple(tensor.shape)}, the model's is {shapes[name]}."
            )
        if tensor.dtype != dtype:
            raise EngineError(f"Update {version}: {name!r} is {tensor.dtype}, not {dtype}.")
        seen.add(name)
        yield name, tensor
    missing = [name for name in shapes if name not in seen]
    if missing:
        raise EngineError(f"Update {version} lacks {len(missing)} of the model's tensors; first {missing[0]!r}.")


@contextmanager
def _by_name() -> Iterator[None]:
    """Shares CPU memory by name: a file descriptor could only be handed to a child process."""
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        mp.set_sharing_strategy(before)
