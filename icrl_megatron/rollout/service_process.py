"""The rank's side of its rollout process: starts it, exchanges messages, and shares weights with it.

Weights lie in one file in memory that has no name
and that both map: the trainer writes the whole model, and the engine reads it when its requests have paused.
"""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from icrl_megatron.distributed.grid import Failure
from icrl_megatron.engines.flat_buffer import FlatBuffer, Placed, Shapes, sizes
from icrl_megatron.engines.protocol import EngineError, NeverSleeps
from icrl_megatron.rollout.channel import Channel
from icrl_megatron.rollout.messages import (
    Asleep,
    FromService,
    Heartbeat,
    Ready,
    ServiceFailed,
    Setup,
    Sleep,
    ToService,
    Update,
    Updated,
)
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.parent_watch import PARENT_ENV
from icrl_megatron.utils.processes import kill_tree

_POLL_S = 0.02
_GRACE_S = 30.0
"""Time that the process has to end when its rank has closed the channel."""


class SharedWeights:
    """A file in memory for all tensors of a model, written by one process and read by another."""

    def __init__(self, descriptor: int) -> None:
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._flat = FlatBuffer(torch.frombuffer(memory, dtype=torch.uint8))

    @staticmethod
    def create(size: int) -> tuple[SharedWeights, int]:
        """Memory for `size` bytes, and the descriptor that the other process inherits. Raises EngineError if there is
        not that much."""
        folder = Path("/dev/shm")
        with tempfile.TemporaryFile(dir=folder if folder.is_dir() else None) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise EngineError(
                    f"No {size / 2**30:.2f} GiB of shared memory for the rollout process's weights ({error.strerror}): "
                    f"make {folder} larger, or set rollout.staleness=0."
                ) from error
            descriptor = os.dup(file.fileno())
        return SharedWeights(descriptor), descriptor

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> tuple[Placed, ...]:
        """Replaces what is there by these tensors, converted to `dtype`."""
        self._flat.clear()
        for name, tensor in tensors:
            self._flat.add(name, tensor, dtype)
        return tuple(self._flat.placed)

    def read(self, placed: Iterable[Placed]) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the memory, which must not change while they are used."""
        return self._flat.tensors(placed)


class RolloutProcess(NeverSleeps):
    """Starts and watches the process. Its messages wait until `take` returns them; nothing here waits for it without a
    limit."""

    def __init__(
        self, setup: Setup, module: str, shapes: Shapes, dtype: torch.dtype, hang_s: float, log: Callable[[str], None]
    ) -> None:
        """`module` is run with the descriptors of its socket and of the weights. `shapes` has those of all tensors,
        which are sent as `dtype`. A process that says nothing for `hang_s` seconds is killed. Raises EngineError if
        there is no memory for the weights."""
        self._setup, self._module, self._dtype, self._hang_s, self._log = setup, module, dtype, hang_s, log
        self._weights, self._descriptor = SharedWeights.create(sizes(shapes, dtype.itemsize)[1])
        self.ready = self.asleep = False
        """`asleep`: the engine takes no request until the next update (`rollout.interleave`)."""
        self._counters = Heartbeat()
        """Sums since they were taken."""
        self._messages: list[FromService] = []
        self._updates: list[int] = []
        """Versions that were sent and not confirmed."""
        self._failure: Failure | None = None
        """What ended the process, if it was an error of its own."""
        self.start()

    def start(self) -> None:
        """Starts the process without waiting for it."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", self._module, str(theirs.fileno()), str(self._descriptor)]
        environment = os.environ | {PARENT_ENV: str(os.getpid())}
        with theirs:
            descriptors = (theirs.fileno(), self._descriptor)
            self._process = subprocess.Popen(command, env=environment, pass_fds=descriptors, stdin=subprocess.DEVNULL)
        self._inbox: queue.SimpleQueue[FromService] = queue.SimpleQueue()
        self._heard_at = time.monotonic()
        self._closed, self._failure, self.ready, self._updates = threading.Event(), None, False, []
        self._counters = replace(self._counters, needs_weights=False)
        inbox = self._inbox  # a thread of the channel before must not reach the new one

        def on_message(message: FromService) -> None:
            inbox.put(message)
            self._heard_at = time.monotonic()

        self._channel = Channel(Connection(ours.detach()), on_message, self._closed.set)
        self._channel.send(self._setup)

    def restart(self) -> None:
        """Kills the process and starts another. Messages that have arrived stay."""
        self.kill()
        self.start()

    def send(self, message: ToService) -> None:
        self._channel.send(message)

    def take(self) -> list[FromService]:
        """The messages since the last call, except those that only this class needs. Raises what ended the process if
        it was an error of its own."""
        self._sort()
        if self._failure is not None:
            raise self._failure.kind(self._failure.message)
        taken, self._messages = self._messages, []
        return taken

    def _sort(self) -> None:
        """Takes messages from the inbox. Raises nothing: where only one rank looks, the others would wait for it."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, ServiceFailed):
                self._failure = message.failure
            elif isinstance(message, Ready):
                self.ready = True
            elif isinstance(message, Updated):
                self._updates.remove(message.version)
            elif isinstance(message, Heartbeat):
                self._counters = _sum(self._counters, message)
            else:
                self._messages.append(message)

    def take_counters(self) -> Heartbeat:
        """The counters since the last call."""
        taken, self._counters = self._counters, Heartbeat(needs_weights=self._counters.needs_weights)
        return taken

    def needs_weights(self) -> bool:
        """Whether its engine was restarted, and was not sent weights since."""
        return self._counters.needs_weights and not self._updates

    def lost(self) -> str:
        """Why the process must be restarted; empty while it works, and if `take` raises what ended it."""
        if self._failure is not None:
            return ""
        if self._closed.is_set() or self._process.poll() is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            if self._inbox.empty():
                code = self._process.returncode
                return f"The rollout process {'cannot be reached' if code is None else f'ended with exit code {code}'}."
        silent = time.monotonic() - self._heard_at
        if self.ready and silent > self._hang_s:
            return f"The rollout process said nothing for {silent:.0f} s."
        return ""

    def wait_ready(self, tick: Callable[[], None] = lambda: None) -> None:
        """Returns when its engine accepts requests. Raises what the process raised while it started, and EngineError if
        it does not start in time."""
        # The process has the same limit for its engine; its message says more.
        deadline = time.monotonic() + self._setup.settings.engine.startup_timeout_s + _GRACE_S
        while not self._ready():
            if why := self.lost():
                raise EngineError(f"{why} Its messages are above.")
            if time.monotonic() > deadline:
                limit = self._setup.settings.engine.startup_timeout_s
                raise EngineError(
                    f"The rollout process was not ready after engine.startup_timeout_s={limit:g} s; raise it if its "
                    "engine needs longer."
                )
            tick()
            time.sleep(_POLL_S)

    def _ready(self) -> bool:
        self._messages = self.take()
        return self.ready

    def wait_for(self, kind: type[FromService], timeout_s: float) -> FromService | None:
        """The first message of this kind; the others stay. None if the process is lost, has failed, or does not answer
        in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._sort()
            for message in self._messages:
                if isinstance(message, kind):
                    self._messages.remove(message)
                    return message
            if self._failure is not None or self.lost() or time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)

    def kill(self) -> None:
        kill_tree(self._process)
        self._channel.close()

    def close(self) -> None:
        """Ends the process with its engine; kills it if that takes too long."""
        self._channel.finish()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._log(f"the rollout process did not end within {_GRACE_S:g} s; it is killed")
        self.kill()

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Returns when the weights are in memory; the engine takes them soon. A process that is lost or has failed gets
        none. If the process has not taken the previous weights in time, `take` raises that on all ranks later: here the
        other ranks are in the same collective."""
        stream = iter(tensors)
        if self._previous_taken():
            stored = self._weights.write(stream, self._dtype)
            self._updates.append(version)
            self.asleep = False
            self.send(Update(version, stored))
        for _ in stream:  # gathering is collective
            pass

    def sleep(self) -> None:
        """With `rollout.interleave`, returns when the engine has released its memory. A process whose engine does not
        do so in time is killed, with the engine: it is restarted when the next step plays."""
        settings = self._setup.settings
        if not settings.rollout.interleave:
            return
        limit = settings.engine.sync_timeout_s
        if self._previous_taken():
            self.send(Sleep())
            if self.wait_for(Asleep, limit) is not None:
                self.asleep = True
                return
        if not self.lost() and self._failure is None:
            self._log(
                f"the engine did not release its memory within engine.sync_timeout_s={limit:g} s; its process is killed"
            )
        self.kill()

    def _previous_taken(self) -> bool:
        limit = self._setup.settings.engine.sync_timeout_s
        deadline = time.monotonic() + limit
        while True:
            self._sort()
            if self._failure is not None or self.lost():
                return False
            if not self._updates:
                return True
            if time.monotonic() > deadline:
                late = EngineError(
                    f"The engine did not take its weights within engine.sync_timeout_s={limit:g} s; raise it, or look "
                    "for the reason in the logs of the engine."
                )
                self._failure = Failure.of(late)
                return False
            time.sleep(_POLL_S)


def _sum(one: Heartbeat, later: Heartbeat) -> Heartbeat:
    return replace(
        later,
        generated=one.generated + later.generated,
        stats=one.stats + later.stats,
        deaths=one.deaths + later.deaths,
    )


def channel(descriptor: int) -> Connection:
    """The connection that a process inherited from its rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the rank, which ends this process
    return Connection(descriptor)


def first_message(connection: Connection) -> Setup:
    """Raises ConfigError if this process was not started by a rank."""
    message = connection.recv()
    if not isinstance(message, Setup):
        raise ConfigError("a rollout process is started by a rank of `icrl train`, not by hand")
    return message
