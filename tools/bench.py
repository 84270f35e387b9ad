"""Runs the benchmarks that this machine supports, one after another, and reports missed bars (limits of results).

    python tools/bench.py                                   all of them, results in benchmarks/
    python tools/bench.py head step --out /tmp/bench        some of them
    python tools/bench.py tasks --bar "grading answers_per_s=300"      with another limit

Each benchmark is a separate process with a time limit. If one fails, misses a bar or times out, the others still run. A
benchmark whose packages are not installed is skipped, and the table gives the reason.

The exit code is 0 if all measured bars are met, 1 if a bar is missed or a benchmark failed, 2 for a wrong argument.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import bench_schema
import limited
import typer
from bench_schema import Bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table

TOOLS = Path(__file__).parent
ENGINE_PYTHON = TOOLS.parent / ".venv" / ".engine-python"
"""`make test-engine` writes the path of the interpreter that has SGLang to this file."""
STYLES = {"MISSED": "red", "failed": "red", "met": "green"}


@dataclass(frozen=True)
class Options:
    """Options that all benchmarks receive."""

    device: str
    engine_python: str
    quick: bool


@dataclass(frozen=True)
class Benchmark:
    """One program in tools/."""

    name: str
    script: str
    result: str
    """Name of the JSON file; may contain {device}."""
    words: Callable[[Options], list[str]]
    quick: tuple[str, ...]
    """Arguments with which it runs in seconds; the results are then meaningless."""
    lacks: Callable[[Options], str] = lambda options: ""
    """Why it cannot run here; empty if it can."""

    def command(self, options: Options, out: Path) -> list[str]:
        more = self.quick if options.quick else ()
        return [sys.executable, str(TOOLS / self.script), *self.words(options), *more, "--out", str(out)]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one benchmark."""

    name: str
    state: str
    """measured | skipped | failed."""
    why: str = ""
    bars: tuple[Bar, ...] = ()

    def fine(self) -> bool:
        return self.state != "failed" and not any(bar.held is False for bar in self.bars)


def not_installed(*modules: str) -> str:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: pip install -e '.[bench]'" if missing else ""


def _head_lacks(options: Options) -> str:
    return "" if options.device == "cuda" else not_installed("liger_kernel")


def _rollout_lacks(options: Options) -> str:
    if options.engine_python or importlib.util.find_spec("sglang") is not None:
        return ""
    return "no interpreter with SGLang: make test-engine creates one, or name one with --engine-python"


def _rollout_words(options: Options) -> list[str]:
    return ["--device", options.device, *(["--python", options.engine_python] if options.engine_python else [])]


BENCHMARKS = (
    Benchmark(
        "head",
        "bench_head.py",
        "head_{device}.json",
        lambda options: ["--device", options.device] if options.device == "cuda" else [],
        ("--rounds", "1", "--tokens", "64", "--vocabulary", "4096"),
        _head_lacks,
    ),
    Benchmark(
        "step",
        "bench_step.py",
        "step_cpu.json",
        lambda options: [],
        ("--rounds", "1", "--steps", "1"),
        lambda options: not_installed("trl", "accelerate", "datasets"),
    ),
    Benchmark("tasks", "bench_tasks.py", "tasks_cpu.json", lambda options: [], ("rulebook_easy", "waiting")),
    Benchmark(
        "agents",
        "bench_agents.py",
        "agents_cpu.json",
        lambda options: [],
        (
            "toolbox",
            "tokens",
            "cache",
            "contended",
            "--rounds=2",
            "--episodes=8",
            "--calls=2",
            "--tool-ms=5",
            "--observations=50",
            "--entries=64",
            "--seconds=0.2",
        ),
    ),
    Benchmark(
        "rollout",
        "bench_rollout.py",
        "rollout_{device}.json",
        _rollout_words,
        ("--rounds", "1", "--requests", "8", "--tasks", "1"),
        _rollout_lacks,
    ),
    Benchmark(
        "balance",
        "bench_balance.py",
        "balance_cpu.json",
        lambda options: [],
        ("--tokens=4e5", "--mean=1000", "--replicas=8", "--rounds=1"),
    ),
    Benchmark(
        "data_plane",
        "bench_data_plane.py",
        "data_plane_cpu.json",
        lambda options: ["model"],
        ("--ranks=8", "--tokens=200000"),
    ),
    Benchmark(
        "deltas",
        "bench_deltas.py",
        "deltas_cpu.json",
        lambda options: [],
        ("--steps=2", "--hidden=64", "--layers=1", "--vocabulary=512"),
    ),
    Benchmark(
        "async",
        "bench_async.py",
        "async_cpu.json",
        lambda options: [],
        ("--rounds=1", "--staleness=4", "--steps=4", "--skip=1", "--median-s=0.05"),
    ),
    Benchmark(
        "e2e",
        "bench_e2e.py",
        "e2e_{device}.json",
        lambda options: ["rulebook_easy", f"launch.device={options.device}"],
        (
            "warm_start.steps=2",
            "rollout.tasks_per_step=2",
            "algo.on_no_signal=train",
            "algo.max_resamples=0",
            "--steps=3",
        ),
    ),
)


def run(benchmark: Benchmark, options: Options, out: Path, timeout_s: float) -> Outcome:
    """Runs one benchmark. Its JSON is copied to `out` only if this run wrote it."""
    if reason := benchmark.lacks(options):
        return Outcome(benchmark.name, "skipped", reason)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / benchmark.result.format(device=options.device)
        code = limited.run(benchmark.command(options, made), timeout_s)
        if code is None:
            return Outcome(benchmark.name, "failed", f"stopped after {timeout_s:g} s (--timeout-s)")
        # A program that missed a bar also ends with 1, but after it has written its results.
        if code not in (0, 1) or not made.exists():
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return Outcome(benchmark.name, "failed", f"{how}; its messages are above")
        try:
            bars = tuple(bench_schema.bars(bench_schema.read(made)))
        except (ValueError, TypeError) as error:
            return Outcome(benchmark.name, "failed", str(error))
        (out / made.name).write_bytes(made.read_bytes())
    return Outcome(benchmark.name, "measured", bars=bars)


def limits(words: Sequence[str]) -> dict[str, float]:
    """{NAME: LIMIT} of words NAME=LIMIT. Raises ValueError on any other word."""
    found = {}
    for word in words:
        name, _, limit = word.rpartition("=")
        try:
            found[name] = float(limit)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"--bar {word!r}: expected NAME=LIMIT, e.g. 'client overhead=0.3'")
    return found


def with_limits(outcomes: Sequence[Outcome], other: dict[str, float]) -> list[Outcome]:
    """The outcomes with these limits replaced."""
    return [
        replace(o, bars=tuple(replace(bar, limit=other.get(bar.name, bar.limit)) for bar in o.bars)) for o in outcomes
    ]


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Prints one row per bar and per benchmark without bars, then a summary line."""
    table = Table("benchmark", "bar", "value", "limit", "", title="bars")
    for outcome in outcomes:
        if not outcome.bars:
            why = escape(outcome.why) or "has no bars"
            table.add_row(outcome.name, why, "", "", outcome.state, style=STYLES.get(outcome.state))
        for bar in outcome.bars:
            table.add_row(outcome.name, *bar.cells(), style=STYLES.get(bar.verdict()))
    console.print(table)
    missed = [f"{o.name}: {bar.name}" for o in outcomes for bar in o.bars if bar.held is False]
    failed = [o.name for o in outcomes if o.state == "failed"]
    skipped = [o.name for o in outcomes if o.state == "skipped"]
    met = sum(bar.held is True for o in outcomes for bar in o.bars)
    parts = [f"{met} bars met", f"{len(missed)} missed{' (' + '; '.join(missed) + ')' if missed else ''}"]
    parts += [f"{what}: {', '.join(names)}" for what, names in (("failed", failed), ("skipped", skipped)) if names]
    console.print(", ".join(parts), markup=False, highlight=False, soft_wrap=True)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks to run; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the JSON results.")] = Path("benchmarks"),
    device: Annotated[str, typer.Option(help="cpu | cuda.")] = "cpu",
    engine_python: Annotated[str, typer.Option(help="Interpreter that has SGLang.", envvar="ICRL_ENGINE_PYTHON")] = "",
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Time limit per benchmark.")] = 1800.0,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, to try the programs; results are meaningless.")] = False,
    bar: Annotated[list[str] | None, typer.Option(metavar="NAME=LIMIT", help="Another limit for a bar.")] = None,
) -> None:
    """Runs the benchmarks and exits with 1 if a bar is missed or a benchmark failed."""
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if not engine_python and ENGINE_PYTHON.exists():
        engine_python = ENGINE_PYTHON.read_text().strip()
    options = Options(device, engine_python, quick)
    console = Console()
    try:
        if unknown := [name for name in names or () if name not in known]:
            raise ValueError(f"{unknown[0]}: one of {', '.join(known)}")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"--device {device}: one of cpu, cuda")
        other = limits(bar or [])
        out.mkdir(parents=True, exist_ok=True)
        outcomes = []
        for name in names or known:
            console.rule(name)
            outcomes.append(run(known[name], options, out, timeout_s))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    outcomes = with_limits(outcomes, other)
    show(outcomes, console)
    if unknown := sorted(set(other) - {bar.name for outcome in outcomes for bar in outcome.bars}):
        print(f"error: --bar {unknown[0]!r}: no benchmark that ran has such a bar", file=sys.stderr)
        raise typer.Exit(2)
    if not all(outcome.fine() for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
