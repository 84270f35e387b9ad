"""Messages between a rank and its rollout process: pickles over a socket pair that only the two have."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

_END_S = 1.0
"""Time that a thread has to notice that the other end is closed."""


class Channel:
    """One end. Threads read and write, so that neither side waits until the other reads."""

    def __init__(self, connection: Connection, on_message: Callable[[Any], None], on_end: Callable[[], None]) -> None:
        """`on_message` gets each message. `on_end` is called when no more messages come, or when one could not be sent.
        Both are called in a thread."""
        self._connection, self._on_message, self._on_end = connection, on_message, on_end
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader, self._writer = (threading.Thread(target=of, daemon=True) for of in (self._read, self._write))
        self._reader.start()
        self._writer.start()

    def send(self, message: Any) -> None:
        """Returns at once. `message` must not change any more."""
        self._outbox.put(message)

    def finish(self, timeout_s: float = 0.0) -> None:
        """The other end sees the end after the messages so far. Waits until they are written, but at most
        `timeout_s`."""
        self._outbox.put(None)
        self._writer.join(timeout_s)

    def close(self) -> None:
        """Call it when the other end is closed or its process has ended."""
        self.finish(_END_S)
        self._reader.join(_END_S)
        self._connection.close()

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                self._on_message(self._connection.recv())
        self._on_end()

    def _write(self) -> None:
        with suppress(OSError):
            try:
                while (message := self._outbox.get()) is not None:
                    self._connection.send(message)
            except Exception:
                self._on_end()
                raise
            with socket.fromfd(self._connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
                end.shutdown(socket.SHUT_WR)
