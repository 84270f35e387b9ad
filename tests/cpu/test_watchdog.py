"""Environment code that blocks costs only its own episode, within the time limit.

The environments really sleep, loop and wait, so the limits are short.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from odd_environments import PROMPTER, Says, Works

from icrl_megatron.rollout import watchdog
from icrl_megatron.rollout.episode import EpisodeSetup, play
from icrl_megatron.rollout.speakers import Seeds, Speakers
from icrl_megatron.rollout.watchdog import WATCHDOG
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import Environment, StepResult
from icrl_megatron.types import DroppedEpisode, Episode, Task

LIMIT_S = 0.3
SETTINGS = RolloutSettings(
    rounds=1, max_turn_tokens=4, max_critique_tokens=4, context_tokens=200, templates="compact",
    environment_timeout_s=LIMIT_S,
)  # fmt: skip
FOREVER_S = 3600
REPEATED = re.compile("(a+)+$")


class Plain(Works):
    """Succeeds after one turn."""

    def __init__(self, task: Task) -> None:
        self.task = task

    async def reset(self) -> str:
        return "go"

    def parse(self, reply: str) -> str | None:
        return reply

    async def step(self, action: str) -> StepResult:
        return StepResult("up", True)

    def outcome(self) -> float:
        return 1.0

    def success(self) -> bool:
        return True


def played(
    bad: Callable[[Task], Environment], tasks: int = 2, **changes: Any
) -> tuple[list[Episode], list[DroppedEpisode], float]:
    """Plays the tasks good/0, bad/1, good/2, ...; returns episodes, dropped episodes and seconds."""
    names = [Task(f"{('good', 'bad')[i % 2]}/{i}", "set", "train", "") for i in range(tasks)]
    environment = lambda task: bad(task) if task.task_id.startswith("bad") else Plain(task)  # noqa: E731
    setup = EpisodeSetup(environment, PROMPTER, replace(SETTINGS, **changes))
    begun = time.monotonic()
    episodes, dropped = asyncio.run(play(names, 1, setup, lambda task, index: Speakers(Says(), Says()), Seeds(0, 0)))
    return episodes, dropped, time.monotonic() - begun


def blocks(code: Callable[[], Any], method: str = "step") -> type[Plain]:
    def sync(self: Plain, *arguments: object) -> Any:
        code()

    async def wait(self: Plain, *arguments: object) -> Any:
        code()

    return type("Blocks", (Plain,), {method: wait if method in ("step", "reset") else sync})


def loops() -> None:
    while True:
        pass


def loops_in_finally() -> None:
    try:
        time.sleep(FOREVER_S)
    finally:
        loops()


def catches_exceptions() -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(FOREVER_S)


def catches_everything() -> None:
    while True:
        try:  # noqa: SIM105
            time.sleep(FOREVER_S)
        except:  # noqa: E722
            pass


def sleeps_past_a_signal() -> None:
    """Like code that enters a system call after the signal arrived but before Python handled it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [watchdog._TICK])
    signal.sigwait([watchdog._TICK])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [watchdog._TICK])
    time.sleep(FOREVER_S)


def catches_and_returns() -> None:
    try:
        time.sleep(FOREVER_S)
    except BaseException:
        return


def locks() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def has_an_alarm() -> None:
    """Like libraries that limit their own calls with an alarm; this must not disable the watchdog."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.alarm(1)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    time.sleep(FOREVER_S)


BLOCKING: dict[str, Callable[[], Any]] = {
    "sleeps": lambda: time.sleep(FOREVER_S),
    "loops": loops,
    "backtracks": lambda: REPEATED.match("a" * 40 + "b"),
    "multiplies": lambda: 9**9**9,
    "counts": lambda: sum(1 for _ in iter(int, 1)),
    "locks": locks,
    "reads": lambda: socket.create_server(("127.0.0.1", 0)).accept(),
    "waits_for_a_process": lambda: subprocess.run(["sleep", str(FOREVER_S)], check=False),
    "loops_in_finally": loops_in_finally,
    "sleeps_past_a_signal": sleeps_past_a_signal,
    "catches_exceptions": catches_exceptions,
    "catches_everything": catches_everything,
    "catches_and_returns": catches_and_returns,
    "has_an_alarm": has_an_alarm,
}


@pytest.mark.parametrize("kind", BLOCKING)
def test_blocking_code_costs_only_its_episode(kind: str) -> None:
    episodes, dropped, seconds = played(blocks(BLOCKING[kind]))
    assert [e.task.task_id for e in episodes] == ["good/0"]
    assert [(d.task.task_id, d.late) for d in dropped] == [("bad/1", True)]
    assert dropped[0].error == f"step took longer than rollout.environment_timeout_s = {LIMIT_S} s"
    assert LIMIT_S <= seconds < LIMIT_S + 2 * watchdog.AGAIN_S + 1


@pytest.mark.parametrize("method", ["__init__", "max_turns", "reset", "parse", "step", "outcome", "success", "summary"])
def test_every_method_is_watched(method: str) -> None:
    kind = blocks(loops, method)
    if method == "max_turns":
        kind = type("Blocks", (Plain,), {"max_turns": property(lambda self: loops())})
    _, dropped, seconds = played(kind)
    what = "construction" if method == "__init__" else method
    assert dropped[0].error.startswith(f"{what} took longer than")
    assert seconds < LIMIT_S + 1


async def waits_forever() -> None:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER_S)


async def cleans_up_forever() -> None:
    try:
        await asyncio.sleep(FOREVER_S)
    finally:
        await asyncio.sleep(FOREVER_S)


async def sleeps() -> None:
    time.sleep(FOREVER_S)


async def gathers() -> None:
    await asyncio.gather(sleeps(), sleeps(), sleeps())


async def waits_in_a_task() -> None:
    await asyncio.wait_for(sleeps(), FOREVER_S)


async def sleeps_in_a_thread() -> None:
    await asyncio.to_thread(time.sleep, FOREVER_S)


async def loops_in_a_thread() -> None:
    await asyncio.to_thread(loops)


async def undoes_its_cancellation() -> None:
    task = asyncio.current_task()
    assert task is not None
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(FOREVER_S)
        task.uncancel()


WAITING = [
    waits_forever,
    undoes_its_cancellation,
    cleans_up_forever,
    gathers,
    waits_in_a_task,
    sleeps_in_a_thread,
    loops_in_a_thread,
]


@pytest.mark.parametrize("code", WAITING)
def test_coroutines_that_wait_or_block_cost_only_their_episode(code: Callable[[], Any]) -> None:
    async def step(self: Plain, action: str) -> StepResult:
        await code()
        return StepResult("", True)

    episodes, dropped, seconds = played(type("Waits", (Plain,), {"step": step}))
    assert (len(episodes), len(dropped)) == (1, 1)
    assert dropped[0].late and "step took longer than" in dropped[0].error
    assert seconds < LIMIT_S + watchdog.GRACE_S + 1


SHORT_GRACE_S = 0.02


async def tries_again(limited: Callable[[], Any]) -> None:
    """A call with a time limit of its own, and then work that takes longer than GRACE_S."""
    with contextlib.suppress(TimeoutError):
        await limited()
    await asyncio.sleep(10 * SHORT_GRACE_S)


async def timeout() -> None:
    async with asyncio.timeout(0.01):
        await asyncio.sleep(FOREVER_S)


async def http_timeout() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    with contextlib.closing(silent):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.05)) as session:
            await session.get(f"http://127.0.0.1:{silent.getsockname()[1]}/")


@pytest.mark.parametrize("limited", [timeout, http_timeout])
def test_code_may_have_a_time_limit_of_its_own(limited: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE_S", SHORT_GRACE_S)

    async def step(self: Plain, action: str) -> StepResult:
        await tries_again(limited)
        return StepResult("", True)

    episodes, dropped, _ = played(type("TriesAgain", (Plain,), {"step": step}), environment_timeout_s=30.0)
    assert (len(episodes), len(dropped)) == (2, 0)


def test_background_task_of_an_environment_does_not_delay_the_end() -> None:
    class Leaves(Plain):
        async def step(self, action: str) -> StepResult:
            self.left = asyncio.create_task(waits_forever())
            return StepResult("", True)

    episodes, dropped, seconds = played(Leaves)
    assert (len(episodes), len(dropped)) == (2, 0)
    assert seconds < watchdog.GRACE_S + 1


def test_looping_threads_are_ended() -> None:
    """Otherwise the thread of a dropped episode would slow the interpreter down forever."""

    class Loops(Plain):
        async def step(self, action: str) -> StepResult:
            await asyncio.to_thread(loops)
            return StepResult("", True)

    before = set(threading.enumerate())
    _, dropped, _ = played(Loops, tasks=4, environment_timeout_s=2.0)
    assert len(dropped) == 2
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_calls_in_threads_return_their_results_and_errors() -> None:
    class Works(Plain):
        async def step(self, action: str) -> StepResult:
            found = await asyncio.gather(*(asyncio.to_thread(pow, 2, i) for i in range(50)))
            with pytest.raises(ZeroDivisionError):
                await asyncio.to_thread(lambda: 1 // 0)
            return StepResult(str(sum(found)), True)

    episodes, _, _ = played(Works, environment_timeout_s=30.0)
    assert episodes[1].attempts[0].turns[0].observation == str(2**50 - 1)


def test_time_blocked_by_another_episode_does_not_count() -> None:
    """An episode whose server answers in time is not dropped because another episode blocked the event loop."""

    class Slow(Plain):
        async def step(self, action: str) -> StepResult:
            if self.task.task_id == "bad/1":
                await asyncio.sleep(0.8)
            else:
                await asyncio.sleep(0.05)
                time.sleep(FOREVER_S)
            return StepResult("", True)

    episodes, dropped, _ = played(Slow, tasks=4, environment_timeout_s=1.2)
    assert [e.task.task_id for e in episodes] == ["good/0", "bad/1", "good/2"]
    assert [d.task.task_id for d in dropped] == ["bad/3"]


def test_results_arrive_in_a_reproducible_order() -> None:
    def order(kind: type[Plain]) -> list[str]:
        ids: list[str] = []
        names = [Task(f"{('good', 'bad')[i % 3 == 1]}/{i}", "set", "train", "") for i in range(6)]
        setup = EpisodeSetup(lambda t: kind(t) if "bad" in t.task_id else Plain(t), PROMPTER, SETTINGS)
        speakers = Speakers(Says(), Says())
        asyncio.run(
            play(names, 1, setup, lambda t, i: speakers, Seeds(0, 0), lambda ended: ids.append(ended.task.task_id))
        )
        return ids

    kind = blocks(lambda: time.sleep(FOREVER_S))
    assert order(kind) == order(kind)


@pytest.fixture
def stop() -> Iterator[list[bool]]:
    """A stop request, which is active once the list has an element."""
    asked: list[bool] = []
    WATCHDOG.obey(asked)
    yield asked
    WATCHDOG.obey(False)


def test_blocking_code_ends_soon_after_a_stop_request(stop: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "STOP_GRACE_S", 1.0)
    timer = threading.Timer(0.5, stop.append, [True])
    timer.start()
    episodes, dropped, seconds = played(blocks(lambda: time.sleep(FOREVER_S)), 8, environment_timeout_s=600.0)
    assert (len(episodes), len(dropped)) == (4, 4)
    assert dropped[0].error == "step blocked a run that was asked to stop"
    # Up to one tick until it is noticed, one second for the first call, and one tick for each other call.
    assert seconds < 0.5 + 1 + 1 + 3 * watchdog.TICK_S + 1


def test_fast_code_is_not_interrupted_after_a_stop_request(stop: list[bool]) -> None:
    stop.append(True)
    episodes, _, _ = played(blocks(lambda: time.sleep(0.1), "parse"), environment_timeout_s=600.0)
    assert len(episodes) == 2
