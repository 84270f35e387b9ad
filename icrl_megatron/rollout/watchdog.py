"""Interrupts environment code that blocks the event loop.

Environments run in a rank's own event loop, where the order of calls does not depend on a clock: runs with the local
engine are bitwise reproducible, and episodes may share objects of their task set. Separate processes would lose both.
Instead a kernel timer interrupts the main thread. It ends sleeps, loops, regular expressions and blocking reads, works
for every task set, and costs a call that returns in time one microsecond.

It cannot interrupt C code that never returns to the interpreter. LAST_RESORT_S after the limit, it ends the process
with a traceback that names that code.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import faulthandler
import math
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from icrl_megatron.rollout.background import DaemonThreads, Overrun
from icrl_megatron.rollout.timer import KernelTimer
from icrl_megatron.tasks.base import EnvironmentFailure

T = TypeVar("T")

SHORTEST_S = 0.05
"""No call is interrupted earlier, however little time it has left, because the machine may be busy."""
LONGEST_S = 1e8
"""Three years, the maximum of kernel timers."""
TICK_S = 1.0
"""Interval at which a running call is checked; a stop request shortens its remaining time."""
STOP_GRACE_S, STOP_SHARE_S = 5.0, 0.5
"""After a stop request, all calls together may block for the first time; once that is used up, each call may block for
the second."""
GRACE_S = 1.0
"""A cancelled coroutine may wait this long for its cleanup."""
STALL_S = 1.0
"""A call that blocks the event loop for longer than this extends the time limits of the calls that wait meanwhile."""
LAST_RESORT_S = 30.0
AGAIN_S = 0.5
"""Code that caught the interruption and continued is interrupted again after this pause."""
_TICK = signal.SIGRTMAX - 5 if sys.platform == "linux" else 0
_LAST_RESORT = signal.SIGVTALRM
"""Measures CPU time of the process, because code that waits can be interrupted by the tick."""

_inside: contextvars.ContextVar[Watched] = contextvars.ContextVar("inside")
"""The call whose code is running; also set in the tasks that it starts."""


@dataclass(eq=False)
class Watched:
    """One call of an environment."""

    limit_s: float
    own: asyncio.Timeout | None = None
    """The time limit of the whole call, once it has started to wait."""
    blocked: bool = False
    """Whether it, or a task that it started, ran until its time was up."""

    def left_s(self) -> float:
        """Seconds that its code may still take."""
        if self.blocked:
            return 0.0
        if self.own is None or (ends := self.own.when()) is None:
            return self.limit_s
        return ends - time.monotonic()


class Raised(Exception):
    """Carries any exception that environment code raised."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class Watchdog:
    """One instance per process (`WATCHDOG`). Outside the main thread, or on another system than Linux, nothing is
    interrupted."""

    def __init__(self) -> None:
        self._stop: object = False
        self._stopped_at = math.inf
        self._blocked_s = 0.0
        """Seconds that calls blocked since the stop request."""
        self._timer: KernelTimer | None = None
        self._next_tick = math.inf
        self._calls = self._calls_seen = 0
        self._begun = 0.0
        self._ends: float | None = None
        """When the running call will be interrupted (time.monotonic()); None if no call is running."""
        self._limit_s = 0.0
        """Time limit of the running or last call."""
        self._interruptions = 0
        """Number of interruptions of the running or last call."""
        self._traced: Any = None
        """The previous trace function of sys.settrace."""
        self._waiting: set[Watched] = set()
        """Calls that are waiting."""
        self._main = threading.main_thread().ident
        self._watching = self._ctrl_c = 0
        self._ctrl_c_handler: Callable[[int, FrameType | None], Any] | None = None
        """The handler while no watched call is running."""
        os.register_at_fork(after_in_child=self._forget)

    def obey(self, stop: object) -> None:
        """Once `stop` is true (`launch.StopRequest`), calls may block only for a short time."""
        self._stop, self._stopped_at, self._blocked_s = stop, math.inf, 0.0

    @property
    def stopping(self) -> bool:
        """Whether a tick during a call saw a stop request."""
        return self._stopped_at < math.inf

    def run(self, code: Callable[[], T], call: Watched) -> T:
        """Runs code of a call.

        Raises Raised with the exception that the code raised, Overrun if it ran until its time was up, and
        KeyboardInterrupt after Ctrl-C.
        """
        if self._ends is not None or not self._ready():
            try:
                return code()
            except BaseException as error:
                raise Raised(error) from error
        ctrl_c, limit_s = self._ctrl_c, min(max(SHORTEST_S, call.left_s()), LONGEST_S)
        self._calls, self._interruptions, self._begun = self._calls + 1, 0, time.monotonic()
        self._ends, self._limit_s = self._begun + limit_s, limit_s
        if min(self._ends, self._begun + TICK_S) < self._next_tick:
            self._tick_in(min(TICK_S, limit_s))
        token = _inside.set(call)
        try:
            return code()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and (self._ctrl_c > ctrl_c or not self._watching):
                raise
            raise Raised(error) from error
        finally:
            self._ends = None
            if self._interruptions > 1:
                sys.settrace(self._traced)
            _inside.reset(token)
            if self._interruptions or time.monotonic() - self._begun > STALL_S:
                self._account(call)

    def _account(self, call: Watched) -> None:
        """After a long call: extends other limits, and raises Overrun if the call was interrupted."""
        now = time.monotonic()
        if now - self._begun > STALL_S:
            for limit in (other.own for other in self._waiting if other is not call and other.own is not None):
                with contextlib.suppress(RuntimeError):  # it has just ended
                    limit.reschedule((limit.when() or math.inf) + now - self._begun)
        if self._interruptions:
            if self._stopped_at < math.inf:
                self._blocked_s += now - max(self._begun, self._stopped_at)
            call.blocked = True
            raise Overrun

    @types.coroutine
    def drive(self, code: Coroutine[Any, Any, T], call: Watched, yielded: Any) -> Generator[Any, Any, T]:
        """Continues a coroutine that waits for `yielded`, and runs each stretch between two waits like `run`, with the
        same exceptions. Without `call.own`, the time limit applies to each stretch.

        A cancelled coroutine that keeps waiting for more than GRACE_S is abandoned, unless it cancelled itself, as a
        time limit of its own does.
        """
        grace, returned = _CancelGrace(), False
        self._waiting.add(call)
        try:
            while True:
                grace.begin(late=call.own is not None and call.own.expired())
                try:
                    given = yield yielded
                    send: Callable[[Any], Any] = code.send
                except asyncio.CancelledError as error:
                    if grace.is_over():
                        raise
                    send, given = code.throw, error
                except Exception as error:
                    send, given = code.throw, error
                try:
                    yielded = self.run(lambda: send(given), call)  # noqa: B023
                except Raised as raised:
                    if returned := isinstance(raised.error, StopIteration):
                        return raised.error.value
                    if grace.cancelled and isinstance(raised.error, asyncio.CancelledError):
                        raise raised.error from None
                    raise
        finally:
            grace.end()
            self._waiting.discard(call)
            if not returned:
                with contextlib.suppress(Raised, Overrun):
                    self.run(lambda: code.close(), Watched(GRACE_S))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Active while episodes are played in the running event loop. Tasks and threads that environments start there
        are treated as environment code, and a Ctrl-C is distinguished from code that raises KeyboardInterrupt."""
        loop = asyncio.get_running_loop()
        if loop.get_task_factory() is None:
            loop.set_task_factory(_task)
            loop.set_default_executor(DaemonThreads(lambda: _inside.get(None) is not None))
        self._watching += 1
        if self._watching == 1 and self._ready() and callable(handler := signal.getsignal(signal.SIGINT)):
            self._ctrl_c_handler = handler
            signal.signal(signal.SIGINT, self._on_ctrl_c)
        try:
            yield
        finally:
            self._watching -= 1
            if not self._watching:
                self._rest()

    def _rest(self) -> None:
        """Stops watching; at process exit, the timer's signal would kill the process."""
        self._stop_ticks()
        if self._ctrl_c_handler is not None:
            signal.signal(signal.SIGINT, self._ctrl_c_handler)
            self._ctrl_c_handler = None

    def _stop_ticks(self) -> None:
        if self._timer is not None:
            self._next_tick = math.inf
            self._timer.set(0.0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _on_ctrl_c(self, number: int, frame: FrameType | None) -> None:
        self._ctrl_c += 1
        if self._ctrl_c_handler is not None:
            self._ctrl_c_handler(number, frame)

    def _ready(self) -> bool:
        if threading.get_ident() != self._main or sys.platform != "linux":
            return False
        if self._timer is None:
            signal.signal(_TICK, self._tick)
            faulthandler.register(_LAST_RESORT, file=2, all_threads=False, chain=True)
            self._timer = KernelTimer(_TICK)
            atexit.register(self._rest)
        return True

    def _forget(self) -> None:
        """Called in a child after fork, which inherits no timers."""
        self._timer, self._next_tick, self._ends = None, math.inf, None

    def _tick_in(self, seconds: float) -> None:
        assert self._timer is not None
        self._next_tick = time.monotonic() + seconds
        # Repeated, because a signal that arrives just before the code enters a system call does not interrupt that
        # call.
        self._timer.set(seconds, AGAIN_S)
        # As long as the interpreter handles ticks, each tick postpones the last resort.
        signal.setitimer(signal.ITIMER_VIRTUAL, self._limit_s + LAST_RESORT_S)

    def _tick(self, number: int, frame: FrameType | None) -> None:
        """Handles the timer's signal: raises Overrun inside a call whose time is up."""
        ends, now = self._ends, time.monotonic()
        if ends is None and self._calls == self._calls_seen:
            self._stop_ticks()  # nothing was called since the last tick; the next call sets the timers
            return
        self._calls_seen = self._calls
        if ends is None:
            self._tick_in(TICK_S)
            return
        if frame is not None and frame.f_code in _WATCHDOG_CODE:  # the call has just ended, or has not begun yet
            self._tick_in(SHORTEST_S)
            return
        if self._stopped_at == math.inf and self._stop:
            self._stopped_at = now
        share = max(STOP_SHARE_S, STOP_GRACE_S - self._blocked_s)
        ends = min(ends, max(self._begun, self._stopped_at) + share)
        if now < ends:
            self._tick_in(min(TICK_S, ends - now))
            return
        if now > ends + LAST_RESORT_S:
            signal.raise_signal(_LAST_RESORT)
        self._tick_in(AGAIN_S)
        self._interruptions += 1
        if self._interruptions == 1:
            self._traced = sys.gettrace()
        else:
            self._interrupt_lines(frame)
        raise Overrun

    def _interrupt_lines(self, frame: FrameType | None) -> None:
        """Also interrupts the next line of the call's code: the one inside `except:`, if it caught the interruption."""

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if self._ends is not None and event in ("call", "line"):
                raise Overrun
            return trace

        while frame is not None and frame.f_code not in _WATCHDOG_CODE:
            frame.f_trace = trace
            frame = frame.f_back
        sys.settrace(trace)


class _CancelGrace:
    """The time that a cancelled coroutine of the current task has to end."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.cancelled, self._cancelling = False, task.cancelling()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, late: bool) -> None:
        """Call before the coroutine waits again. `late`: the time of the call is up."""
        task = asyncio.current_task()
        assert task is not None
        if task.cancelling() <= self._cancelling and not late:
            self.cancelled = False  # a time limit of the code's own cancelled the task, and took that back
        if self.cancelled and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GRACE_S, task.cancel)

    def is_over(self) -> bool:
        """Whether this cancellation came from the timer and is the last one; it then no longer counts as one of the
        task."""
        self.cancelled = True
        if self._timer is None or self._timer.when() > asyncio.get_running_loop().time():
            return False
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        return True

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


_WATCHDOG_CODE = frozenset(f.__code__ for f in (Watchdog.run, Watchdog._tick_in, KernelTimer.set))
"""Functions whose frames hold no environment code."""


def first_step(code: Coroutine[Any, Any, T]) -> tuple[bool, Any]:
    """Runs a coroutine until it returns or waits: (whether it returned, its result or what it waits for)."""
    try:
        return False, code.send(None)
    except StopIteration as end:
        return True, end.value


def _task(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
    """A task factory that watches tasks started by environments."""
    parent = _inside.get(None)
    return asyncio.Task(coro if parent is None else _child(coro, parent), loop=loop, **options)


async def _child(coro: Coroutine[Any, Any, T], parent: Watched) -> T:
    call = Watched(parent.limit_s, blocked=parent.blocked)
    try:
        returned, found = WATCHDOG.run(lambda: first_step(coro), call)
        return found if returned else await WATCHDOG.drive(coro, call, found)
    except Overrun:
        parent.blocked = True
        raise
    except Raised as raised:
        error = raised.error
        parent.blocked = parent.blocked or isinstance(error, Overrun)
        if isinstance(error, SystemExit | KeyboardInterrupt):  # asyncio would let it end the event loop
            raise EnvironmentFailure(f"a task of the environment raised {type(error).__name__}") from error
        raise error from error.__cause__


WATCHDOG = Watchdog()
