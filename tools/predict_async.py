"""What the simulation of `icrl plan --async` predicts for `tools/bench_async.py`, beside what that measured.

    python tools/predict_async.py benchmarks/async_cpu.json

Two numbers are taken from one arm, the synchronous one without waits: the seconds in which a step's episodes are
played, and the rest of the step. The other seven arms are predicted. The environment's waits are those of
`tools/waiting_tasks.py`, drawn independently. Assumed: an iteration of the engine takes the same time for any number
of requests, the three requests of an episode (attempt, critique, attempt) are of equal length, `--failed` of the first
attempts fail, and the rollout process does not slow down the trainer.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_schema
import numpy as np
from bench_async import ARMS, EPISODES_PER_TASK, TASKS_PER_STEP
from waiting_tasks import LONGEST_S

from icrl_megatron.plan.async_simulation import (
    EnginePool,
    Group,
    LeadRule,
    SimulatedTurn,
    Trainer,
    simulate,
)
from icrl_megatron.plan.engine_speed import DecodeSpeed

REQUESTS = 3
CASES = ("waiting", "no waits")


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


def groups(median_s: float, sigma: float, failed: float, seed: int = 0) -> Callable[[int], Group]:
    """Requests of one token each."""

    def group(number: int) -> Group:
        rng = np.random.default_rng((seed, number))
        waits = np.minimum(median_s * rng.lognormal(0.0, sigma, (EPISODES_PER_TASK, 2)), LONGEST_S)
        again = rng.random(EPISODES_PER_TASK) < failed
        return tuple(
            (SimulatedTurn(1, wait_s=first), SimulatedTurn(1), SimulatedTurn(1, wait_s=second))
            if more
            else (SimulatedTurn(1, wait_s=first),)
            for (first, second), more in zip(waits.tolist(), again, strict=True)
        )

    return group


def predict(result: Mapping[str, Any], failed: float) -> list[Arm]:
    """Raises ValueError for a result that is not of bench_async.py."""
    try:
        medians, settings = result["medians"], result["settings"]
        names = {f"{case}, {k}": (case, k) for case in CASES for k in ARMS}
        measured = {name: float(medians[name]["seconds_per_episode"]) for name in names}
        share = float(medians["no waits, 0"]["waited_share"])
        wait, steps = (float(settings["median_s"]), float(settings["sigma"])), int(settings["steps"])
        skip = int(settings["skip"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a result of tools/bench_async.py ({error!r} is missing or no number)") from error
    if not (0 < share < 1 and all(math.isfinite(s) and s > 0 for s in measured.values()) and 0 <= wait[1] < 5):
        raise ValueError("seconds_per_episode and waited_share must be above 0, waited_share below 1, sigma below 5")
    step_s = measured["no waits, 0"] * TASKS_PER_STEP * EPISODES_PER_TASK
    engines = EnginePool(1, DecodeSpeed(fixed_s=share * step_s / (REQUESTS if failed > 0 else 1)))
    trainer = Trainer(TASKS_PER_STEP, fixed_s=(1.0 - share) * step_s)
    predicted = {}
    for name, (case, staleness) in names.items():
        group = groups(*(wait if case == CASES[0] else (0.0, 0.0)), failed)
        seconds = simulate(engines, trainer, LeadRule(steps, staleness), group).step_s(skip)
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
    parser.add_argument("--failed", type=float, default=0.5, help="share of the first attempts that fail")
    arguments = parser.parse_args()
    try:
        if not 0 <= arguments.failed <= 1:
            raise ValueError(f"--failed {arguments.failed}: must be from 0 to 1")
        arms = predict(bench_schema.read(arguments.result), arguments.failed)
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
