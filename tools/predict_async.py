"""What the simulation of `icrl plan --async` predicts for `tools/bench_async.py`, beside what that measured.

    python tools/predict_async.py benchmarks/async_cpu.json

The simulation replays the requests and waits of the first synchronous run of each case. Two more numbers are from the
synchronous arm without waits: the seconds in which a step's episodes are played, and the rest of the step. The other
seven arms are predicted. Assumed: an iteration of the engine takes the same time for any number of requests, and the
rollout process does not slow down the trainer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_schema
from bench_async import ARMS, EPISODES_PER_TASK, TASKS_PER_STEP

from icrl_megatron.plan.async_simulation import (
    EnginePool,
    Group,
    LeadRule,
    SimulatedTurn,
    Trainer,
    simulate,
)
from icrl_megatron.plan.engine_speed import DecodeSpeed

CASES = ("waiting", "no waits")
Trace = list[list[list[float]]]
"""A group as `bench_async.trace` writes it."""


@dataclass(frozen=True)
class Arm:
    case: str
    staleness: int
    measured: float
    """Speedup over the synchronous arm of the case."""
    predicted: float
    measured_s: float
    """Seconds per trained episode."""
    predicted_s: float


def groups(trace: Sequence[Trace]) -> Callable[[int], Group]:
    """The groups of a run in its order, again from the beginning where it has too few."""
    read = [
        tuple(tuple(SimulatedTurn(max(1.0, tokens), wait_s=wait) for tokens, wait in episode) for episode in group)
        for group in trace
    ]
    return lambda number: read[number % len(read)]


def longest(trace: Sequence[Trace]) -> float:
    """Tokens of the longest episode of a step, on average."""
    steps = [trace[i : i + TASKS_PER_STEP] for i in range(0, len(trace), TASKS_PER_STEP)]
    tokens = [max(sum(n for n, _ in episode) for group in step for episode in group) for step in steps]
    return sum(tokens) / len(tokens)


def predict(result: Mapping[str, Any]) -> list[Arm]:
    """Raises ValueError for a result that is not of bench_async.py."""
    try:
        medians, settings = result["medians"], result["settings"]
        traces = {case: [json.loads(group) for group in of] for case, of in result["traces"].items()}
        names = {f"{case}, {k}": (case, k) for case in CASES for k in ARMS}
        measured = {name: float(medians[name]["seconds_per_episode"]) for name in names}
        share = float(medians["no waits, 0"]["waited_share"])
        steps, skip, interleave = int(settings["steps"]), int(settings["skip"]), bool(settings["interleave"])
        played, tokens = {case: groups(traces[case]) for case in CASES}, longest(traces["no waits"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a result of tools/bench_async.py ({error!r} is missing or no number)") from error
    if not (0 < share < 1 and tokens > 0 and all(math.isfinite(s) and s > 0 for s in measured.values())):
        raise ValueError("seconds_per_episode, waited_share and tokens must be above 0, waited_share below 1")
    step_s = measured["no waits, 0"] * TASKS_PER_STEP * EPISODES_PER_TASK
    engines = EnginePool(1, DecodeSpeed(fixed_s=share * step_s / tokens))
    predicted = {}
    for name, (case, staleness) in names.items():
        trainer = Trainer(TASKS_PER_STEP, (1.0 - share) * step_s, on_engine_gpus=interleave and staleness > 0)
        seconds = simulate(engines, trainer, LeadRule(steps, staleness), played[case]).step_s(skip)
        predicted[name] = seconds / (TASKS_PER_STEP * EPISODES_PER_TASK)
    return [
        Arm(
            case=case,
            staleness=k,
            measured=measured[f"{case}, 0"] / measured[name],
            predicted=predicted[f"{case}, 0"] / predicted[name],
            measured_s=measured[name],
            predicted_s=predicted[name],
        )
        for name, (case, k) in names.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    try:
        arms = predict(bench_schema.read(arguments.result))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print("case      staleness  s per episode: measured, predicted  speedup: measured, predicted   error")
    for arm in arms:
        seconds = f"{arm.measured_s:22.4f}, {arm.predicted_s:9.4f}"
        speedups = f"{arm.measured:17.2f}, {arm.predicted:9.2f}"
        print(f"{arm.case:8}  {arm.staleness:9}  {seconds}  {speedups}  {arm.predicted / arm.measured - 1:+7.1%}")


if __name__ == "__main__":
    main()
