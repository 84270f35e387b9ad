"""Resident memory of a run's ranks does not grow with its steps."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from whole_runs import RECIPE, end, ranks_below, start

RANKS = 2
MOST_MIB = 5.0
EARLY, LATE, WINDOW = 200, 450, 31
"""First and last compared step, and the number of steps per measurement. docs/LOG.md compares
the memory of such a run with one that keeps 32 KiB in every step."""
SMALL = (
    "warm_start.steps=0",
    "model.init=null",
    "rollout.tasks_per_step=2",
    "rollout.episodes_per_task=2",
    "eval.problems=8",
    "eval.control_problems=0",
    "checkpoint.interval=20",  # as in the recipe; the first checkpoint allocates memory once
    "algo.on_no_signal=train",
    "algo.max_resamples=0",
    "optim.learning_rate=0",  # learning would lengthen replies, and so increase memory
)


def resident_by_step(folder: Path, steps: int, ranks: int, *overrides: str) -> dict[int, dict[int, list[float]]]:
    """Starts a run; returns each rank's resident MiB by process and step, sampled many times per step."""
    process = start("train", RECIPE, f"run_dir={folder}", f"steps={steps}", f"launch.ranks={ranks}", *SMALL, *overrides)
    path, step, seen = folder / "metrics.jsonl", 0, defaultdict(lambda: defaultdict(list))
    while not path.exists():
        assert process.poll() is None, end(process)
        time.sleep(0.05)
    watched = ranks_below(process.pid)
    assert len(watched) == ranks
    with path.open(encoding="utf-8") as file:
        while process.poll() is None:
            step += sum(line.endswith("\n") and '"actor/loss"' in line for line in file)
            for one in watched:
                try:
                    seen[one.pid][step].append(one.memory_info().rss / 2**20)
                except psutil.NoSuchProcess:
                    break
            time.sleep(0.01)
    code, _, err = end(process)
    assert code == 0, err
    return seen


def low(by_step: dict[int, list[float]], steps: range) -> float:
    """Lower quartile of the steps' medians. After a batch with long replies, freed pages stay in the heap until a later
    step returns them, so higher values only show the largest batch."""
    return statistics.quantiles([statistics.median(by_step[step]) for step in steps if step in by_step], n=4)[0]


def leaks(levels: Sequence[float]) -> bool:
    """Whether memory, measured at the start of each third and at the end, leaks MOST_MIB in total: a leak adds in every
    third, whereas a large batch adds once and a stabilizing heap adds less and less."""
    return all(after - before > MOST_MIB / 3 for before, after in itertools.pairwise(levels))


@pytest.mark.parametrize(
    ("levels", "leak"),
    [
        ((570.0, 574.5, 580.1, 585.8), True),  # measured with torch's flight recorder enabled
        ((549.6, 557.0, 565.3, 578.8), True),  # measured with glibc's default limits
        ((569.0, 574.9, 576.5, 577.9), False),  # a stabilizing heap
        ((564.6, 562.9, 572.3, 568.9), False),  # a policy that learned to give longer replies
        ((541.0, 538.9, 539.3, 544.2), False),
    ],
)
def test_leak_criterion_on_measured_curves(levels: tuple[float, ...], leak: bool) -> None:
    assert leaks(levels) is leak


@pytest.mark.dist
@pytest.mark.slow
def test_memory_does_not_grow_with_steps(finished_run: Path, tmp_path: Path) -> None:
    """Rank 0 of two runs all the code of a run with one rank."""
    model = f"model.path={finished_run / 'warm_start' / 'hf'}"
    seen = resident_by_step(tmp_path / "run", LATE, RANKS, model)
    assert len(seen) == RANKS
    for by_step in seen.values():
        # After the last step the run evaluates and exports, so the last window ends before it.
        starts = [EARLY + (LATE - WINDOW - EARLY) * third // 3 for third in range(4)]
        curve = [round(low(by_step, range(start, start + 25)), 1) for start in range(0, LATE, 25)]
        levels = [low(by_step, range(start, start + WINDOW)) for start in starts]
        assert not leaks(levels), f"resident MiB of a rank in windows of 25 steps: {curve}"
