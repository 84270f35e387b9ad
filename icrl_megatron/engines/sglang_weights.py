"""Transfers weights to an SGLang server in flat buckets of bounded size, by shared memory.

A bucket is one buffer of bytes that holds several tensors end to end, with the position of each. A server on the
trainer's machine maps the buffer: shared memory on a CPU, CUDA IPC on a GPU (SGLang's update_weights_from_tensor). For
other servers the tensors are broadcast (`sglang_group.py`). If one bucket does not hold all weights, one is filled
while the server copies the other. Facts are from SGLang 0.5.23:
managers/scheduler_components/weight_updater.py, weight_sync/tensor_bucket.py, and SafeUnpickler in utils/common.py.
"""

from __future__ import annotations

import base64
import io
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from icrl_megatron.engines.flat_buffer import FlatBuffer, Shapes, sizes
from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.engines.sglang_server import Server

B = TypeVar("B")


class Bucket(FlatBuffer):
    """A reusable buffer: the receiver has copied its contents before it answers. (A server on a GPU drops its view of
    the buffer before it answers, and torch waits for the copies of a stream that used one.)"""

    def __init__(self, capacity: int, device: torch.device) -> None:
        super().__init__(torch.empty(capacity, dtype=torch.uint8, device=device))
        if device.type == "cpu":
            with _by_name(), _without_signals():
                self.buffer.share_memory_()

    def handle(self) -> bytes:
        """What SGLang unpickles: a handle to the buffer (not its bytes) and the positions."""
        if self.buffer.is_cuda:
            torch.cuda.synchronize()  # the receiver's stream is not ordered after ours
        places = [
            # SGLang reads attributes, and its unpickler allows this class; the trainer need not have SGLang.
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


Answer = Callable[[], None]
"""Waits for the server's answer. Raises EngineError if it refused or did not answer in time."""


class Transport(Protocol):
    """Sends buckets to a server. All ranks that send a share of the weights make the same calls in the same order, and
    wait for each answer before the next call."""

    def begin(self, lost: str) -> Answer:
        """Opens an update. `lost` is the reason why the server must not be used; empty if it is alive."""
        ...

    def send(self, bucket: Bucket, options: dict[str, Any]) -> Answer:
        """The bucket must not change until the server has answered."""
        ...

    def close(self) -> None: ...


class SharedMemory:
    """For a server on this machine: each of its workers gets a handle to a buffer on its own device.

    `group` holds the ranks that send one buffer each, so that no worker reads another GPU's memory (not measured on
    GPUs yet); it is None if one buffer serves all workers, as on a CPU.
    """

    def __init__(self, server: Server | None, workers: int, group: Any, lead: int, timeout_s: float) -> None:
        """`lead` is the rank that has the `server`; it is the first of the group."""
        self._server, self._workers, self._group = server, workers, group
        self._lead, self._timeout_s = lead, timeout_s
        self._threads = ThreadPoolExecutor(1)

    def begin(self, lost: str) -> Answer:
        return self._ask("/begin_weight_update", {}, lost)

    def send(self, bucket: Bucket, options: dict[str, Any]) -> Answer:
        mine = bucket.handle()
        everyone: list[Any] = [mine] * self._workers
        if self._group is not None:
            everyone = [None] * dist.get_world_size(self._group)
            dist.all_gather_object(everyone, mine, group=self._group)
        body = {
            "serialized_named_tensors": [base64.b64encode(h).decode() for h in everyone[: self._workers]],
            "load_format": "flattened_bucket",
            **options,
        }
        return self._ask("/update_weights_from_tensor", body)

    def _ask(self, path: str, body: dict[str, Any], lost: str = "") -> Answer:
        answer: Answer | None = None
        if self._server is not None:
            answer = partial(refuse, lost) if lost else asked(self._threads, self._server, path, body, self._timeout_s)
        return answer if answer is not None and self._group is None else partial(self._agree, answer)

    def _agree(self, answer: Answer | None) -> None:
        """Broadcasts the leader's result: all ranks succeed or fail."""
        failure: list[EngineError | None] = [None]
        if answer is not None:
            try:
                answer()
            except EngineError as error:
                failure = [error]
        dist.broadcast_object_list(failure, src=self._lead, group=self._group)
        if failure[0] is not None:
            raise failure[0]

    def close(self) -> None:
        self._threads.shutdown(wait=False)


class WeightSender:
    """Checks tensors, fills buckets with them and sends these over a transport. The buffers are allocated at first use,
    and kept only on a CPU."""

    def __init__(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, bucket_mib: int, keep_cache: bool = False
    ) -> None:
        """`shapes` has every Hugging Face tensor of the model. `keep_cache`: the server keeps its prefix cache."""
        self.shapes, self.dtype, self.device, self.keep_cache = shapes, dtype, device, keep_cache
        # As few requests as possible: one costs as much as copying tens of MiB (docs/LOG.md).
        self.limit = bucket_mib << 20
        self._pair: tuple[Bucket, Bucket] | None = None

    def send_all(
        self, tensors: Iterable[tuple[str, Tensor]], version: int, transport: Transport, lost: str = ""
    ) -> None:
        """Sends a complete update. With the last bucket the server takes the new version and flushes its prefix cache,
        unless it is kept. Raises EngineError after all copies have ended."""
        pair = self._pair or self._buckets()
        each = filled(checked(tensors, self.shapes, self.dtype, version), pair, self.limit)
        deliver(each, transport.send, transport.begin(lost), version, not self.keep_cache)
        if self.device.type == "cpu":
            self._pair = pair
        else:
            del each, pair
            torch.cuda.ipc_collect()  # frees shared memory that the server has released

    def _buckets(self) -> tuple[Bucket, Bucket]:
        """Two buckets that alternate; the same one twice if all weights fit into it."""
        largest, total = sizes(self.shapes, self.dtype.itemsize)
        first = Bucket(max(largest, min(self.limit, total)), self.device)
        return first, first if total <= self.limit else Bucket(len(first.buffer), self.device)


def deliver(
    buckets: Iterable[tuple[B, bool]],
    send: Callable[[B, dict[str, Any]], Answer],
    answer: Answer,
    version: int,
    flush: bool = True,
) -> None:
    """Sends a complete update, of which `answer` is that of the beginning. `buckets` are pairs (bucket, whether it is
    the last); each is sent when the one before was answered. `flush`: the last one flushes the prefix cache.

    Raises EngineError after all copies have ended.
    """
    try:
        for bucket, last in buckets:
            answer()  # the server has copied the other bucket
            options = {"abort_all_requests": False, "flush_cache": last and flush}
            answer = send(bucket, {**options, "weight_version": str(version) if last else None})
    except EngineError:
        with suppress(EngineError):  # report the first error
            answer()
        raise
    answer()


def filled(
    tensors: Iterable[tuple[str, Tensor]], pair: tuple[Bucket, Bucket], limit: int
) -> Iterator[tuple[Bucket, bool]]:
    """Fills the two buckets alternately, with up to `limit` bytes or one larger tensor. Yields (bucket to send, whether
    it is the last). When the caller requests the next bucket, it may still be sending this one, but not the one
    before."""
    bucket, other = pair
    bucket.clear()
    for name, tensor in tensors:
        if bucket.placed and bucket.start() + tensor.nbytes > limit:
            yield bucket, False
            bucket, other = other, bucket
            bucket.clear()
        bucket.add(name, tensor)
    if bucket.placed:
        yield bucket, True


def checked(
    tensors: Iterable[tuple[str, Tensor]], shapes: Shapes, dtype: torch.dtype, version: int
) -> Iterator[tuple[str, Tensor]]:
    """Yields the same tensors after checking that each belongs to the model: a malformed update would kill the server.

    Raises EngineError naming the first bad tensor, and if names are missing.
    """
    seen: set[str] = set()
    for name, tensor in tensors:
        if name not in shapes:
            raise EngineError(f"Update {version}: the model has no tensor {name!r}.")
        if name in seen:
            raise EngineError(f"Update {version}: {name!r} was sent twice.")
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


def asked(threads: ThreadPoolExecutor, server: Server, path: str, body: dict[str, Any], timeout_s: float) -> Answer:
    """POSTs from another thread; the answer raises what `Server.post` raises."""
    future = threads.submit(server.post, path, body, timeout_s)

    def wait() -> None:
        future.result()

    return wait


def refuse(why: str) -> None:
    raise EngineError(why)


@contextmanager
def _by_name() -> Iterator[None]:
    """Shares CPU memory by name: a file descriptor could only be passed to a child process."""
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        mp.set_sharing_strategy(before)


@contextmanager
def _without_signals() -> Iterator[None]:
    """Holds signals back from this thread. The first shared buffer of a process makes torch start its
    `torch_shm_manager`, and torch 2.13 loops forever if a signal arrives while it waits for that program's first line:
    it repeats the test for EINTR, but not the read."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
