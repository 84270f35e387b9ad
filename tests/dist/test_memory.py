"""Resident memory of a run's ranks does not grow with its steps."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
from whole_runs import RECIPE, end, start

STEPS = 600
EARLY, LATE = range(400, 451), range(STEPS - 31, STEPS)  # after the last step the run evaluates and exports
"""The heap of a rank settles in about 400 steps: of 900 steps, the last 500 added less than 2 MiB, and the steps from 50
to 400 added 10 to 20 MiB."""
MOST_MIB = 5.0
"""With torch's flight recorder on (TORCH_FR_BUFFER_SIZE=2000), one rank grew by 5.4 MiB and another by 1.5 MiB."""
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
)


def ranks_below(launcher: int) -> list[psutil.Process]:
    """The ranks that a launcher has started: not the agent between them, whose arguments name the module too."""
    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "icrl_megatron.train" in words and "icrl_megatron.launch.agent" not in words:
            found.append(process)
    return found


def resident_by_step(folder: Path, ranks: int, *overrides: str) -> dict[int, dict[int, list[float]]]:
    """MiB of each rank, by process and step, sampled many times a step while a run of STEPS steps goes on."""
    process = start("train", RECIPE, f"run_dir={folder}", f"steps={STEPS}", f"launch.ranks={ranks}", *SMALL, *overrides)
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
def test_memory_does_not_grow_with_steps(finished_run: Path, tmp_path: Path) -> None:
    ranks = 2
    seen = resident_by_step(tmp_path / "run", ranks, f"model.path={finished_run / 'warm_start' / 'hf'}")
    assert len(seen) == ranks
    for by_step in seen.values():
        early, late = low(by_step, EARLY), low(by_step, LATE)
        curve = [round(low(by_step, range(start, start + 25)), 1) for start in range(0, STEPS, 25)]
        assert late - early < MOST_MIB, f"resident MiB of a rank in windows of 25 steps: {curve}"
