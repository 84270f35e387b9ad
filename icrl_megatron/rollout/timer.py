"""A kernel timer that signals one thread (timer_create(2)). alarm(2) and setitimer(2) are left to environments and test
runners, which use them to limit calls."""

from __future__ import annotations

import ctypes
import threading
import time

_SIGEV_THREAD_ID = 4


class _SigEvent(ctypes.Structure):
    """`struct sigevent`, sigevent(7)."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("padding", ctypes.c_char * 44),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`: an interval, and the time until the timer expires."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "seconds", "nanoseconds"))


class KernelTimer:
    """Sends a signal to the thread that created it. Linux only; a child after fork does not inherit it."""

    def __init__(self, number: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        event = _SigEvent(None, number, _SIGEV_THREAD_ID, threading.get_native_id())
        if self._libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)) != 0:
            raise OSError(ctypes.get_errno(), "timer_create")

    def set(self, seconds: float, again_s: float = 0.0) -> None:
        """Signals after `seconds`, and then every `again_s` seconds unless that is 0. `seconds` = 0 disarms the
        timer."""
        (every, every_ns), (whole, whole_ns) = ((int(t), int((t - int(t)) * 1e9)) for t in (again_s, seconds))
        times = _Times(every, every_ns, whole, whole_ns)
        self._libc.timer_settime(self._timer, 0, ctypes.byref(times), None)
