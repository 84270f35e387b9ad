"""A weight sync on one machine without GPUs: buckets that the server maps for each request, against mapped ones.

    python tools/time_sync.py --python PATH_OF_AN_INTERPRETER_WITH_SGLANG --rounds 14

`mapped` is the trainer's transport. `kept` sends the same buckets to a loader that keeps them mapped in the server
(`kept_buckets.py`). `/4` splits the weights into at least four requests, so that one bucket is filled while the server
copies the other. The arms alternate on one server and use the same buffers, because the physical memory of a buffer
changes the time of a copy. Each update is of other bits, and a checksum of every parameter is compared after the first
and the last update of each arm. One copy of as many bytes runs in this process before and after each update. All
processes compute on one thread, so that their CPU seconds hold no waiting.

Prints for each update: milliseconds, CPU milliseconds of this process and of the server, page faults of the server, and
CPU milliseconds of the two copies; then the medians of each arm.
"""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
import torch.multiprocessing as mp
import typer
from bench_rollout import LARGER, MODELS, refused, serving
from torch import Tensor

from icrl_megatron.engines.flat_buffer import sizes
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_build import folder_tensors, tensor_shapes
from icrl_megatron.engines.sglang_server import Server, ServerSpec
from icrl_megatron.engines.sglang_weights import Answer, Bucket, SharedMemory, Transport, WeightSender, asked
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings
from icrl_megatron.utils import processes

CPU = torch.device("cpu")
LOADERS = ("kept_buckets.load", "kept_buckets.forget")
PARTS = 4
TIMEOUT_S = 600.0
Tensors = list[tuple[str, Tensor]]


class Spec(ServerSpec):
    """A server on one thread that can import the loaders."""

    def environment(self, port: int, key: str, meeting: Path) -> dict[str, str]:
        # Not tools/ itself: its other modules would come before the server's packages.
        shutil.copy(Path(__file__).with_name("kept_buckets.py"), meeting.parent)
        return super().environment(port, key, meeting) | {"PYTHONPATH": str(meeting.parent), "OMP_NUM_THREADS": "1"}


class Kept(Transport):
    """Sends buckets to the loader that keeps them mapped."""

    def __init__(self, server: Server) -> None:
        self._server, self._threads = server, ThreadPoolExecutor(1)

    def begin(self, lost: str) -> Answer:
        return asked(self._threads, self._server, "/begin_weight_update", {}, TIMEOUT_S)

    def send(self, bucket: Bucket, options: dict[str, Any]) -> Answer:
        return self._load(handle(bucket), LOADERS[0], options)

    def forget(self) -> None:
        """The server unmaps all buckets."""
        self.begin("")()
        options = {"abort_all_requests": False, "flush_cache": False, "weight_version": None}
        self._load(pickle.dumps([("", torch.empty(0))]), LOADERS[1], options)()
        self._server.post("/end_weight_update", {}, TIMEOUT_S)

    def _load(self, handle: bytes, loader: str, options: dict[str, Any]) -> Answer:
        body = {"serialized_named_tensors": [base64.b64encode(handle).decode()], "load_format": loader, **options}
        return asked(self._threads, self._server, "/update_weights_from_tensor", body, TIMEOUT_S)

    def close(self) -> None:
        self._threads.shutdown(wait=False)


def handle(bucket: Bucket) -> bytes:
    """What the server unpickles and gives to `kept_buckets.load`. Needs torch's file_system strategy."""
    places = [[p.name, p.shape, str(p.dtype).removeprefix("torch."), p.start, p.end] for p in bucket.placed]
    return bytes(ForkingPickler.dumps([(json.dumps(places), bucket.buffer[: bucket.used])]))


@dataclass(frozen=True)
class Update:
    """One measured update; times in seconds."""

    seconds: float
    own_cpu: float
    server_cpu: float
    faults: int
    copies_cpu: tuple[float, float]
    """Of one copy of as many bytes in this process, before and after the update."""

    def line(self) -> str:
        times = (1e3 * t for t in (self.seconds, self.own_cpu, self.server_cpu, *self.copies_cpu))
        all_ms, own, server, before, after = (f"{t:.1f}" for t in times)
        return f"{all_ms} ms, CPU {own} + {server} ms, {self.faults} faults, copies {before} and {after} ms"


class Arm:
    """One way to send all weights."""

    def __init__(self, name: str, sender: WeightSender, transport: Transport, kept: Kept) -> None:
        self.name, self.updates = name, list[Update]()
        self._sender, self._transport, self._kept = sender, transport, kept

    def prepare(self, server: Server, tensors: Tensors) -> None:
        """Maps the buckets in the server for `kept`, and unmaps them otherwise."""
        if self._transport is self._kept:
            self.push(server, tensors, 1)
        else:
            self._kept.forget()

    def push(self, server: Server, tensors: Tensors, version: int) -> None:
        self._sender.send_all(tensors, version, self._transport)
        server.post("/end_weight_update", {}, TIMEOUT_S)


def spent(server: Server) -> tuple[float, int]:
    """CPU seconds and page faults of the server's processes so far, from /proc: psutil rounds to 10 ms."""
    pid = server.pid()
    assert pid is not None
    nanoseconds = faults = 0
    for process in processes.tree(pid):
        where = Path(f"/proc/{process.pid}")
        try:
            nanoseconds += sum(int(t.read_text().split()[0]) for t in where.glob("task/*/schedstat"))
            faults += int((where / "stat").read_text().rsplit(")", 1)[1].split()[7])
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):  # it has just ended
            continue
    return nanoseconds / 1e9, faults


def copied(source: Tensor, target: Tensor) -> float:
    """CPU seconds of one copy."""
    begun = time.process_time()
    target.copy_(source)
    return time.process_time() - begun


def measured(arm: Arm, server: Server, tensors: Tensors, version: int, buffers: tuple[Tensor, Tensor]) -> Update:
    for _, tensor in tensors:  # an update that did not arrive would leave other bits
        tensor.view(torch.int32).bitwise_xor_(version & 255)
    arm.prepare(server, tensors)
    for _, tensor in tensors:
        tensor.view(torch.int32).bitwise_xor_(1 << 8)
    before, (cpu, faults) = copied(*buffers), spent(server)
    own, begun = time.process_time(), time.perf_counter()
    arm.push(server, tensors, version)
    seconds, own = time.perf_counter() - begun, time.process_time() - own
    cpu_after, faults_after = spent(server)
    return Update(seconds, own, cpu_after - cpu, faults_after - faults, (before, copied(*buffers)))


def bench(engine: SGLangEngine, folder: Path, rounds: int) -> None:
    """Measures all arms in turns and prints."""
    server, shapes, dtype = engine.server, tensor_shapes(folder), torch.float32
    tensors, model = list(folder_tensors(folder, dtype, CPU)), ModelShape.read(folder)
    total = sizes(shapes, dtype.itemsize)[1]
    kept, mapped = Kept(server), SharedMemory(server, 1, None, 0, TIMEOUT_S)
    whole, split = (WeightSender(shapes, dtype, CPU, -(-total // parts >> 20)) for parts in (1, PARTS))
    arms = [Arm("mapped", whole, mapped, kept), Arm("kept", whole, kept, kept)]
    arms += [Arm(f"mapped/{PARTS}", split, mapped, kept), Arm(f"kept/{PARTS}", split, kept, kept)]
    buffers = torch.ones(total, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)
    for number in range(rounds + 1):
        for arm in arms if number % 2 else reversed(arms):
            update = measured(arm, server, tensors, 2 + number, buffers)
            if number in (0, rounds) and not engine.verify(tensors, model):
                raise SystemExit("error: the server ended")
            if number:  # the first round creates the buffers
                arm.updates.append(update)
                print(f"{total / 1e6:.0f} MB  {arm.name}: {update.line()}", flush=True)
    copy = median(seconds for arm in arms for update in arm.updates for seconds in update.copies_cpu)
    for arm in arms:
        print(f"{total / 1e6:.0f} MB  {arm.name}, medians: {summary(arm.updates, copy)}")
    for transport in (kept, mapped):
        transport.close()


def summary(updates: Iterable[Update], copy: float) -> str:
    of = list(updates)
    own, server = (median(values) / copy for values in ([u.own_cpu for u in of], [u.server_cpu for u in of]))
    wall = f"{1e3 * median(u.seconds for u in of):.0f} ms (fastest {1e3 * min(u.seconds for u in of):.0f})"
    return f"{wall}; CPU {own + server:.2f} copies ({own:.2f} here, {server:.2f} in the server)"


def main(
    python: Annotated[str, typer.Option(help="Interpreter that has SGLang; empty: this one.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Updates of each arm, after a warm-up.")] = 14,
) -> None:
    """Measures both of the models that bench_rollout.py syncs on a CPU; exits with 2 if this machine cannot."""
    if reason := refused("cpu", python, None):
        print(f"error: {reason}", file=sys.stderr)
        raise typer.Exit(2)
    torch.set_num_threads(1)
    mp.set_sharing_strategy("file_system")  # by name, as the trainer shares its buckets
    settings = EngineSettings(
        kind="sglang",
        python=python,
        startup_timeout_s=900.0,
        server_args=["--custom-weight-loader", *LOADERS],
    )
    for model in (LARGER["cpu"], MODELS["cpu"]):
        with serving(model, settings, CPU, Spec) as (engine, _, folder):
            bench(engine, folder, rounds)


if __name__ == "__main__":
    typer.run(main)
