"""Resident memory of a run's ranks does not grow with its steps."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
from whole_runs import RECIPE, end, ranks_below, start

MOST_MIB = 5.0
"""With torch's flight recorder on (TORCH_FR_BUFFER_SIZE=2000), ranks grew by 10 MiB on one rank, and by 5.4 MiB on two
(one of them)."""
WINDOW = 31
"""Steps whose memory is compared."""
SMALL = (
    "warm_start.steps=0",
    "model.init=null",
    "rollout.tasks_per_step=2",
    "rollout.episodes_per_task=4",
    "eval.problems=8",
    "eval.control_problems=0",
    "checkpoint.interval=20",  # the recipe's own; the first one takes memory once
    "algo.on_no_signal=train",
    "algo.max_resamples=0",
    "optim.learning_rate=0",  # a policy that learns writes longer replies, and larger batches take more memory
)


def resident_by_step(folder: Path, steps: int, ranks: int, *overrides: str) -> dict[int, dict[int, list[float]]]:
    """MiB of each rank, by process and step, sampled many times a step while a run of so many steps goes on."""
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
    """The lower quartile over some steps of their medians. A batch with long replies leaves free pages at the end of
    the heap, which a later step returns: the upper values say what the largest batch was."""
    return statistics.quantiles([statistics.median(by_step[step]) for step in steps if step in by_step], n=4)[0]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "early", "late"), [(1, 50, 300), (2, 400, 600)])
def test_memory_does_not_grow_with_steps(ranks: int, early: int, late: int, finished_run: Path, tmp_path: Path) -> None:
    """From step `early` to step `late`. The heaps of two ranks settle in about 400 steps: of 900 steps, the last 500
    added less than 2 MiB, and the steps from 50 to 400 added 10 to 20 MiB.

    A leak adds memory in every third of these steps. One large batch adds it once (up to 9 MiB within 25 steps, of
    which 3 went back), so a rank fails only if it grew overall and in each third."""
    model = f"model.path={finished_run / 'warm_start' / 'hf'}"
    seen = resident_by_step(tmp_path / "run", late, ranks, model)
    assert len(seen) == ranks
    for by_step in seen.values():
        # After the last step the run evaluates and exports, so the last window ends before it.
        starts = [early + (late - WINDOW - early) * third // 3 for third in range(4)]
        levels = [low(by_step, range(start, start + WINDOW)) for start in starts]
        grew = [after - before for before, after in itertools.pairwise(levels)]
        curve = [round(low(by_step, range(start, start + 25)), 1) for start in range(0, late, 25)]
        leaks = sum(grew) > MOST_MIB and all(third > MOST_MIB / 6 for third in grew)
        assert not leaks, f"resident MiB of a rank in windows of 25 steps: {curve}"
