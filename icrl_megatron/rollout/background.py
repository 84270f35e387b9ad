"""An executor whose daemon threads do not delay the end of an event loop or of the process."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

THREADS = 32


class Overrun(BaseException):
    """Raised inside environment code that took too long. Not an Exception, because environment code often catches
    those."""


class DaemonThreads(ThreadPoolExecutor):
    """Default executor of an event loop (for `asyncio.to_thread`) that never waits for its threads.

    asyncio waits for its threads when the loop ends, and Python waits again at exit, so one call that never returns
    would keep a run from ending. Here a thread is abandoned once its caller stops waiting. If an environment started
    the call (`interruptible`), its Python code is also interrupted. At most THREADS calls that still have a waiting
    caller run at once.
    """

    def __init__(self, interruptible: Callable[[], bool]) -> None:
        super().__init__(max_workers=1)  # asyncio requires this base class; its own threads never start
        self._interruptible = interruptible
        self._lock = threading.Lock()
        self._waiting: deque[_Call] = deque()
        self._running = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        call = _Call(lambda: fn(*args, **kwargs), self, self._interruptible())
        with self._lock:
            self._waiting.append(call)
            self._start_next()
        return call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Does not wait."""

    def left(self, call: _Call) -> None:
        """Abandons a running call whose caller stopped waiting."""
        with self._lock:
            if call.ended:
                return
            call.ended = True
            self._running -= 1
            self._start_next()
            if call.interruptible and call.thread is not None and call.thread.ident is not None:
                ident, error = ctypes.c_ulong(call.thread.ident), ctypes.py_object(Overrun)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)

    def _start_next(self) -> None:
        """The caller must hold the lock."""
        while self._waiting and self._running < THREADS:
            call = self._waiting.popleft()
            if call.set_running_or_notify_cancel():
                call.thread = threading.Thread(target=self._run, args=(call,), daemon=True, name="environment")
                call.thread.start()
                self._running += 1

    def _run(self, call: _Call) -> None:
        with contextlib.suppress(Overrun):  # it may arrive after the call has returned
            self._finish(call)

    def _finish(self, call: _Call) -> None:
        error: BaseException | None = None
        result = None
        try:
            result = call.code()
        except BaseException as raised:
            error = raised
        with self._lock:
            if call.ended:
                return
            call.ended = True
            self._running -= 1
            self._start_next()
        if error is not None:
            call.set_exception(error)
        else:
            call.set_result(result)


class _Call(Future[Any]):
    def __init__(self, code: Callable[[], Any], threads: DaemonThreads, interruptible: bool) -> None:
        super().__init__()
        self.code, self.interruptible = code, interruptible
        self.thread: threading.Thread | None = None
        self.ended = False
        self._threads = threads

    def cancel(self) -> bool:
        """asyncio calls this when the coroutine that waits for the call is cancelled."""
        if super().cancel():
            return True
        if self.running():
            self._threads.left(self)
        return False
