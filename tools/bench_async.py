"""Wall clock per trained sample of asynchronous rollouts (`rollout.staleness`), against the synchronous mode.

    python tools/bench_async.py --out benchmarks/async_cpu.json
    python tools/bench_async.py --engine-python PYTHON_WITH_SGLANG      # on the real SGLang
    python tools/bench_async.py --interleave                            # engines that sleep while the actor trains

Each arm is a whole `icrl train` of the same tiny model on Rulebook problems, from the same weights, with the real actor
and engine. In the waiting case the environment waits before each answer, with a lognormal distribution (`--median-s`,
`--sigma`): its tail is what a synchronous step waits for. In the other case it does not wait. The arms take turns, and
all of their runs are in the result, with the requests and waits of every episode of the first synchronous run
(`tools/predict_async.py` replays them). Time counts from the end of step `--skip` to the end of the last but `--skip`
step: at the beginning the queue fills, and at the end it runs empty.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import bench_schema
from bench_schema import Bar
from rich.console import Console
from rich.table import Table
from waiting_tasks import wait_s

from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.types import Episode

TASKS = Path(__file__).with_name("waiting_tasks.py")
ARMS = (0, 1, 2, 4)
TASKS_PER_STEP, EPISODES_PER_TASK = 8, 4
TARGET, NEVER_SLOWER = 1.7, 0.95
POLL_S = 0.01
LIMIT_S = 1800.0
LEARNING_RATE = 1e-12
"""The policy stays the same: otherwise the arms would learn to give different answers, and wait differently long."""
WARM_START_STEPS = 120
"""So that most replies have an action, and therefore a wait."""
MEASURED = ("rounds", "steps", "skip", "median_s", "sigma", "interleave")
"""Arguments that the result repeats."""


def train(folder: Path, *overrides: str) -> list[float]:
    """Trains a run; returns the clock at the end of each step. Raises RuntimeError if it fails."""
    words = [sys.executable, "-c", "from icrl_megatron.cli import main; main()", "train", "rulebook_easy"]
    words += [f"run_dir={folder}", "eval.interval=0", "eval.control_problems=0", "eval.problems=1", *overrides]
    ends, metrics, begun = list[float](), folder / "metrics.jsonl", time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        running = subprocess.Popen(words, stdout=said, stderr=said)
        while running.poll() is None:
            now = time.monotonic()
            if now - begun > LIMIT_S:
                running.kill()
                raise RuntimeError(f"{folder} took longer than {LIMIT_S:g} s")
            rows = metrics.read_text().count('"tokens/generated":') if metrics.exists() else 0
            ends += [now] * (rows - len(ends))
            time.sleep(POLL_S)
        if running.returncode:
            said.seek(0)
            raise RuntimeError(f"{folder} failed with exit code {running.returncode}: {said.read()[-2000:]}")
    return ends


def arm(
    folder: Path, model: Path, staleness: int, wait: tuple[float, float], arguments: argparse.Namespace
) -> dict[str, float]:
    """One run: seconds per sample in the measured steps, and its counters."""
    overrides = [
        *(f"model.path={model}", "warm_start.steps=0", f"steps={arguments.steps}", "checkpoint.interval=1000"),
        *(f"rollout.tasks_per_step={TASKS_PER_STEP}", f"rollout.episodes_per_task={EPISODES_PER_TASK}"),
        *("algo.on_no_signal=train", "algo.max_resamples=0", f"optim.learning_rate={LEARNING_RATE}"),
        *("algo.mismatch_correction.enabled=true", f"rollout.staleness={staleness}"),
        f"telemetry.dump={'none' if staleness else 'all'}",
        f"tasks.sources=[{{name: '{TASKS}:WaitingRulebook', options: {{median_s: {wait[0]}, sigma: {wait[1]}}}}}]",
    ]
    if arguments.interleave and staleness:
        overrides += ["rollout.interleave=true"]
    if arguments.engine_python:
        overrides += ["engine.kind=sglang", f"engine.python={arguments.engine_python}"]
    ends = train(folder, *overrides)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "tokens/generated" in row]
    first, last = arguments.skip - 1, len(ends) - 1 - arguments.skip
    counted = rows[first + 1 : last + 1]
    samples = sum(row["episodes/played"] for row in counted)
    return {
        "seconds_per_episode": (ends[last] - ends[first]) / samples,
        "waited_share": sum(row["time/rollout_s"] for row in counted) / (ends[last] - ends[first]),
        "stale_mean": statistics.fmean(row.get("staleness/mean", 0.0) for row in counted),
        "dropped_groups": sum(row.get("staleness/dropped_groups", 0.0) for row in rows),
        "mismatch_max": max(row.get("actor/mismatch_max", 0.0) for row in rows),
    }


def trace(folder: Path, median_s: float, sigma: float) -> list[str]:
    """The groups of a run in the order of its steps, each as JSON, so that the result has a line for each: for each
    episode its requests as [generated tokens, seconds that the environment waited after it]."""
    dumps, groups = Rollouts(folder), list[str]()
    for step in dumps.steps:
        for _, episodes in groupby(dumps.episodes(step), key=lambda episode: episode.task.task_id):
            groups.append(json.dumps([requests(episode, median_s, sigma) for episode in episodes]))
    return groups


def requests(episode: Episode, median_s: float, sigma: float) -> list[list[float]]:
    found = list[list[float]]()
    for attempt in episode.attempts:
        calls = 0
        for turn in attempt.turns:
            calls += turn.action is not None
            problem = episode.task.problem
            wait = 0.0 if turn.action is None else wait_s(problem, turn.action, calls, median_s, sigma)
            found.append([len(turn.completion.ids), round(wait, 3)])
        found += [[len(c.completion.ids), 0.0] for c in episode.critiques if c.round == attempt.round]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each arm")
    parser.add_argument("--staleness", type=int, nargs="+", default=ARMS, help="the arms; 0 is always one")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--skip", type=int, default=6, help="steps at both ends that are not measured")
    parser.add_argument("--median-s", type=float, default=0.4)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--engine-python", default="", help="play on SGLang, with this interpreter")
    parser.add_argument("--interleave", action="store_true", help="the engine sleeps while the actor trains")
    arguments = parser.parse_args()
    cases = {"waiting": (arguments.median_s, arguments.sigma), "no waits": (0.0, 0.0)}
    arms = sorted({0, *arguments.staleness})
    runs: dict[str, list[dict[str, float]]] = {f"{case}, {k}": [] for case in cases for k in arms}
    traces = dict[str, list[str]]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = ("steps=1", f"warm_start.steps={WARM_START_STEPS}", "algo.on_no_signal=train", "algo.max_resamples=0")
        train(folder / "start", *started)
        model = folder / "start" / "warm_start" / "hf"
        for turn in range(arguments.rounds):
            for case, wait in cases.items():
                for staleness in arms if turn % 2 == 0 else reversed(arms):
                    name = f"{case}, {staleness}"
                    where = folder / f"{turn}_{name.replace(', ', '_')}"
                    found = arm(where, model, staleness, wait, arguments)
                    runs[name].append(found)
                    if not staleness and case not in traces:
                        traces[case] = trace(where, *wait)
                    print(name, json.dumps(found), file=sys.stderr, flush=True)
    report(arguments, runs, traces)


def report(arguments: argparse.Namespace, runs: dict[str, list[dict[str, float]]], traces: dict[str, Any]) -> None:
    medians = {
        name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items() if of
    }
    for case in traces:
        base = medians[f"{case}, 0"]["seconds_per_episode"]
        for name, of in medians.items():
            if name.startswith(case):
                of["speedup"] = base / of["seconds_per_episode"]
    slowest = min(of["speedup"] for name, of in medians.items() if name.startswith("no waits") and name[-3:] != ", 0")
    four = medians["waiting, 4"]["speedup"] if "waiting, 4" in medians else None
    bars = [
        Bar("speedup at staleness 4, waiting", four, TARGET, at_least=True),
        Bar("slowest speedup without waits", slowest, NEVER_SLOWER, at_least=True),
    ]
    table = Table("case, staleness", "s per episode", "all runs", "speedup", "share of time waited", "dropped groups")
    for name, of in medians.items():
        every = " ".join(f"{run['seconds_per_episode']:.4f}" for run in runs[name])
        numbers = f"{of['seconds_per_episode']:.4f}", every, f"{of['speedup']:.2f}", f"{of['waited_share']:.0%}"
        table.add_row(name, *numbers, f"{of['dropped_groups']:.0f}")
    Console(stderr=True).print(table)
    result = bench_schema.about() | {
        "engine": "sglang" if arguments.engine_python else "local",
        "settings": {key: getattr(arguments, key) for key in MEASURED},
        "medians": medians,
        "runs": runs,
        "traces": traces,
        "bars": bars,
    }
    if arguments.out:
        bench_schema.write(arguments.out, "async", result)
    print(json.dumps(bench_schema.stamped("async", result)))


if __name__ == "__main__":
    main()
