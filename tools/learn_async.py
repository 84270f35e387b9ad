"""Whether asynchronous runs (`rollout.staleness`) learn what the synchronous one learns from equally many samples.

    python tools/learn_async.py [--out benchmarks/learn_async] [--runs runs/learn_async] [--seeds 5] [--jobs 2]

Rulebook hard and Household with staleness 0, 1 and 4, all with `algo.mismatch_correction`. The runs of a task start
from one warm start and train for the recipe's number of steps, each on the same number of groups: a batch without a
signal is not drawn again. Finished runs are skipped, so the same command resumes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Annotated

import reproduce_small as small
import typer
from rich.console import Console
from rich.table import Table

from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows

TASKS = ("rulebook_hard", "household")
STALENESS = (0, 1, 4)


@dataclass(frozen=True)
class Learned:
    """One run: held-out critique-free success before and after, in [0, 1], and what it was trained on."""

    task: str
    staleness: int
    seed: int
    before: float
    after: float
    steps: int
    trained_episodes: int
    dropped_groups: int
    """Groups that were too old."""
    behind: float
    """Mean versions between a group's beginning and the step that trained on it."""


def main(
    out: Annotated[Path, typer.Option(help="Stem of the .json and .md that are written.")] = Path(
        "benchmarks/learn_async"
    ),
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/learn_async"),
    seeds: int = 5,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 2,
) -> None:
    """Runs the missing runs, then writes the table."""
    begun = time.monotonic()
    cells = list(product(range(seeds), TASKS, STALENESS))
    trainings = [partial(train, runs, task, staleness, seed) for seed, task, staleness in cells]
    small.play(jobs, [partial(small.warm_start, runs, task) for task in TASKS], trainings)
    results = [read(runs, task, staleness, seed) for seed, task, staleness in cells]
    small.record(out, begun, results=[asdict(one) for one in results])
    shown = Table("staleness", *TASKS, title="Held-out critique-free success: mean [95 %] (seeds)")
    lines = ["| staleness | " + " | ".join(TASKS) + " |", "| --- " * (len(TASKS) + 1) + "|"]
    for staleness in STALENESS:
        row = [str(staleness), *(summary(results, task, staleness) for task in TASKS)]
        shown.add_row(*row)
        lines.append("| " + " | ".join(row) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    Console().print(shown)


def train(runs: Path, task: str, staleness: int, seed: int) -> str:
    """Runs one cell unless it is finished; returns a line to print."""
    where = small.folder(runs, task, f"staleness {staleness}", seed)
    if not small.finished(where):
        start = runs / task / "start" / "warm_start" / "hf"
        overrides = [
            *(f"run_dir={where}", f"seed={seed}", f"model.path={start}", "warm_start.steps=0", "launch.ranks=1"),
            *("baseline=", "eval.control_problems=0", "algo.mismatch_correction.enabled=true"),
            *(f"rollout.staleness={staleness}", "algo.on_no_signal=skip", "algo.max_resamples=0"),
        ]
        small.run(["train", task, *overrides], where.with_suffix(".log"))
    return str(read(runs, task, staleness, seed))


def read(runs: Path, task: str, staleness: int, seed: int) -> Learned:
    arm = f"staleness {staleness}"
    result = small.read(runs, task, arm, seed)
    rows = [r for r in read_rows(small.folder(runs, task, arm, seed) / METRICS_FILE) if "tokens/generated" in r]
    return Learned(
        task=task,
        staleness=staleness,
        seed=seed,
        before=result.before,
        after=result.after,
        steps=result.steps,
        trained_episodes=int(sum(row["episodes/played"] for row in rows)),
        dropped_groups=int(sum(row.get("staleness/dropped_groups", 0.0) for row in rows)),
        behind=round(sum(row.get("staleness/mean", 0.0) for row in rows) / len(rows), 2),
    )


def summary(results: list[Learned], task: str, staleness: int) -> str:
    """Mean over seeds with Student's 95 % interval, each seed's value, and the groups dropped on average."""
    chosen = [one for one in results if (one.task, one.staleness) == (task, staleness)]
    dropped = f"; {mean(one.dropped_groups for one in chosen):.0f} groups dropped" if staleness else ""
    return small.interval([one.after for one in chosen]) + dropped


if __name__ == "__main__":
    typer.run(main)
