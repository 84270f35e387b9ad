"""Ends code of an environment that blocks the event loop.

Environments are played in a rank's own event loop, where no clock decides on the order of calls: runs with the local
engine repeat bit for bit, and episodes may share what their task set holds. Processes of their own would give up both,
so a kernel timer interrupts the main thread instead: that ends sleeps, loops, regular expressions and blocking reads
where they are, works for every task set, and costs a call that returns in time a microsecond.

What it cannot interrupt is C code that never returns to the interpreter. LAST_RESORT_S later it ends the process, with
a traceback that names it.
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
"""No call is interrupted earlier, however little time it has left: the machine may be busy."""
LONGEST_S = 1e8
"""Three years: what kernel timers can hold."""
TICK_S = 1.0
"""A call that runs is looked at this often: a stop request shortens the time that it has left."""
STOP_GRACE_S, STOP_SHARE_S = 5.0, 0.5
"""After a stop request, all calls together may block for the first; once that is used up, each for the second."""
GRACE_S = 1.0
"""A coroutine that was cancelled may wait this long for what it cleans up."""
STALL_S = 1.0
"""A call that blocks the event loop for longer extends the time limits of the calls that wait meanwhile."""
LAST_RESORT_S = 30.0
AGAIN_S = 0.5
"""After such a pause, code that has caught the interruption and went on is interrupted again."""
_TICK = signal.SIGRTMAX - 5 if sys.platform == "linux" else 0
_LAST_RESORT = signal.SIGVTALRM
"""Comes by the CPU time of the process: whatever waits can be interrupted."""

_inside: contextvars.ContextVar[Watched] = contextvars.ContextVar("inside")
"""The call whose code runs; also in the tasks that it starts."""


@dataclass(eq=False)
class Watched:
    """One call of an environment."""

    limit_s: float
    own: asyncio.Timeout | None = None
    """The time limit of the whole call, once it waits."""
    blocked: bool = False
    """Whether it, or a task that it started, ran until its time was up."""

    def left_s(self) -> float:
        """What its code may take now."""
        if self.blocked:
            return 0.0
        if self.own is None or (ends := self.own.when()) is None:
            return self.limit_s
        return ends - time.monotonic()


class Raised(Exception):
    """Carries what code of an environment raised, whatever that was."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class Watchdog:
    """One for each process (`WATCHDOG`). Outside of the main thread, and of Linux, nothing is interrupted."""

    def __init__(self) -> None:
        self._stop: object = False
        self._stopped_at = math.inf
        self._blocked_s = 0.0
        """By calls, since the stop request."""
        self._timer: KernelTimer | None = None
        self._next_tick = math.inf
        self._calls = self._calls_seen = 0
        self._begun = 0.0
        self._ends: float | None = None
        """When the call that runs will be interrupted (time.monotonic()); None while none runs."""
        self._limit_s = 0.0
        """Of the call that runs, or ran last."""
        self._interruptions = 0
        """Of the call that runs, or ran last."""
        self._traced: Any = None
        """What sys.settrace had been given before."""
        self._waiting: set[Watched] = set()
        """The calls that wait."""
        self._main = threading.main_thread().ident
        self._duties = self._ctrl_c = 0
        self._ctrl_c_handler: Callable[[int, FrameType | None], Any] | None = None
        """The handler while no watched call is running."""
        os.register_at_fork(after_in_child=self._forget)

    def obey(self, stop: object) -> None:
        """From when `stop` counts as true (`launch.StopRequest`), calls may block for a short time only."""
        self._stop, self._stopped_at, self._blocked_s = stop, math.inf, 0.0

    @property
    def stopping(self) -> bool:
        """Whether a call met a stop request."""
        return self._stopped_at < math.inf

    def run(self, code: Callable[[], T], call: Watched) -> T:
        """Runs code of a call.

        Raises Raised with whatever the code raised, Overrun when it ran until the time was up, and KeyboardInterrupt
        after Ctrl-C.
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
            if isinstance(error, KeyboardInterrupt) and (self._ctrl_c > ctrl_c or not self._duties):
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
        """After code ran for long: raises Overrun if it was interrupted."""
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
        """Goes on with a coroutine that waits for `yielded`, and runs each stretch of it between two waits like `run`,
        which it raises like. Without `call.own`, the time limit is that of each stretch.

        A coroutine that is cancelled and goes on waiting for more than GRACE_S is abandoned.
        """
        patience, returned = _Patience(), False
        self._waiting.add(call)
        try:
            while True:
                patience.begin()
                try:
                    given = yield yielded
                    send: Callable[[Any], Any] = code.send
                except asyncio.CancelledError as error:
                    if patience.is_over():
                        raise
                    send, given = code.throw, error
                except Exception as error:
                    send, given = code.throw, error
                try:
                    yielded = self.run(lambda: send(given), call)  # noqa: B023
                except Raised as raised:
                    if returned := isinstance(raised.error, StopIteration):
                        return raised.error.value
                    if patience.cancelled and isinstance(raised.error, asyncio.CancelledError):
                        raise raised.error from None
                    raise
        finally:
            patience.end()
            self._waiting.discard(call)
            if not returned:
                with contextlib.suppress(Raised, Overrun):
                    self.run(lambda: code.close(), Watched(GRACE_S))

    @contextlib.contextmanager
    def on_duty(self) -> Iterator[None]:
        """While episodes are played in the running event loop: what environments start there, tasks and threads, is
        treated as their own code, and a Ctrl-C is told from code that raises KeyboardInterrupt."""
        loop = asyncio.get_running_loop()
        if loop.get_task_factory() is None:
            loop.set_task_factory(_task)
            loop.set_default_executor(DaemonThreads(lambda: _inside.get(None) is not None))
        self._duties += 1
        if self._duties == 1 and self._ready() and callable(handler := signal.getsignal(signal.SIGINT)):
            self._ctrl_c_handler = handler
            signal.signal(signal.SIGINT, self._on_ctrl_c)
        try:
            yield
        finally:
            self._duties -= 1
            if not self._duties:
                self._rest()

    def _rest(self) -> None:
        """Nothing is watched any more; at the process's end, the timer's signal would kill it."""
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
        """In a child after fork, which inherits no timers."""
        self._timer, self._next_tick, self._ends = None, math.inf, None

    def _tick_in(self, seconds: float) -> None:
        assert self._timer is not None
        self._next_tick = time.monotonic() + seconds
        # Again and again: a signal that comes just before the code enters a system call does not interrupt that call.
        self._timer.set(seconds, AGAIN_S)
        # As long as the interpreter handles ticks, each of them puts the last resort off.
        signal.setitimer(signal.ITIMER_VIRTUAL, self._limit_s + LAST_RESORT_S)

    def _tick(self, number: int, frame: FrameType | None) -> None:
        """The timer's signal: raises Overrun inside of a call whose time is up."""
        ends, now = self._ends, time.monotonic()
        if ends is None and self._calls == self._calls_seen:
            self._stop_ticks()  # nothing was called since the last tick; the next call sets the timers
            return
        self._calls_seen = self._calls
        if ends is None:
            self._tick_in(TICK_S)
            return
        if frame is not None and frame.f_code in _OURS:  # the call has just ended, or has not begun yet
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
        """Interrupts the next line, too, that the code of the call executes: the one inside `except:`, where it caught
        the interruption."""

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            if self._ends is not None and event in ("call", "line"):
                raise Overrun
            return trace

        while frame is not None and frame.f_code not in _OURS:
            frame.f_trace = trace
            frame = frame.f_back
        sys.settrace(trace)


class _Patience:
    """With a coroutine that was cancelled and has not ended."""

    def __init__(self) -> None:
        self.cancelled = False
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """It waits again."""
        if self.cancelled and self._timer is None:
            task = asyncio.current_task()
            assert task is not None
            self._timer = asyncio.get_running_loop().call_later(GRACE_S, task.cancel)

    def is_over(self) -> bool:
        """Whether a cancellation is the last one; it is the timer's then, and no longer counts as one of the task."""
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


_OURS = frozenset(f.__code__ for f in (Watchdog.run, Watchdog._tick_in, KernelTimer.set))
"""Whose frames hold no code of an environment."""


def first_step(code: Coroutine[Any, Any, T]) -> tuple[bool, Any]:
    """Runs a coroutine until it returns or waits: (whether it returned, its result or what it waits for)."""
    try:
        return False, code.send(None)
    except StopIteration as end:
        return True, end.value


def _task(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
    """A task factory: what environments start is watched as they are."""
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
