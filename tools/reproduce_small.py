"""The paper's comparison on two CPU cores: `make reproduce-small`; three seeds took 34 minutes.

Three task settings (Rulebook hard and easy, Household), six arms, five seeds. All arms and seeds of a task share one
warm start; the seed determines the drawn problems and every sampled token. ICRL runs a fixed number of steps; every
other arm of the same task and seed stops when it has generated as many tokens as ICRL. Finished runs are skipped, so
the same command resumes an interrupted reproduction.

    python tools/reproduce_small.py [--out benchmarks/reproduce_small] [--runs runs/reproduce] [--seeds 5] [--jobs 2]

`--first-seed 3` runs seeds 3 and 4 only. The table then also has the results that OUT.json records of other seeds, and
the picture, which needs every run's metrics, is left as it was.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

from icrl_megatron.report.plots import arms_picture
from icrl_megatron.settings import arms
from icrl_megatron.telemetry.metrics import HELDOUT
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows

TASKS = ("rulebook_hard", "rulebook_easy", "household")
COMPARED = ("icrl", "grpo", "no_calibration", "no_role_groups", "frozen_critic", "not_internalised")
ARMS = {name.replace("_", " "): arms.ARMS[name].changes for name in COMPARED}
"""What each arm changes of the task's recipe, by the name in the table."""
JOB_LIMIT_S = 1800


@dataclass(frozen=True)
class Result:
    """One run: its final held-out critique-free success, in [0, 1], and its cost."""

    task: str
    arm: str
    seed: int
    before: float
    after: float
    steps: int
    generated_tokens: int
    seconds: float


def main(
    out: Annotated[Path, typer.Option(help="Stem of the .json, .md and .png that are written.")] = Path(
        "benchmarks/reproduce_small"
    ),
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/reproduce"),
    seeds: int = 5,
    first_seed: Annotated[int, typer.Option(help="The earlier seeds are taken from OUT.json.")] = 0,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one core each.")] = 2,
    tasks: Annotated[str, typer.Option(help="Comma-separated task settings.")] = ",".join(TASKS),
    only_report: Annotated[bool, typer.Option("--only-report", help="Only report the existing runs.")] = False,
) -> None:
    """Runs the missing runs, then writes the table and the picture."""
    begun, chosen, played = time.monotonic(), tasks.split(","), range(first_seed, seeds)
    earlier = recorded(out, first_seed)
    if not only_report:

        def trainings(names: Iterable[str]) -> list[Callable[[], str]]:
            return [partial(train, runs, task, arm, seed) for arm in names for seed in played for task in chosen]

        # ICRL first: its token count is the budget of the other arms.
        warm_starts = [partial(warm_start, runs, task) for task in chosen]
        play(jobs, warm_starts, trainings(["icrl"]), trainings(arm for arm in ARMS if arm != "icrl"))
    results = [
        read(runs, task, arm, seed)
        for task in chosen
        for arm in ARMS
        for seed in played
        if finished(folder(runs, task, arm, seed))
    ]
    results = earlier + results
    write(results, runs, out, begun, curves=not earlier)
    Console().print(table(results))
    Console(stderr=True).print(f"{out}.json  {out}.md  {out}.png")


def folder(runs: Path, task: str, arm: str, seed: int) -> Path:
    return runs / task / f"{arm.replace(' ', '_')}_{seed}"


def finished(run: Path) -> bool:
    return (run / "hf").exists()


def warm_start(runs: Path, task: str) -> str:
    run(["sft", task, f"run_dir={runs / task / 'start'}", "launch.ranks=1"], runs / task / "start.log")
    return f"warm start of {task}"


def train(runs: Path, task: str, arm: str, seed: int) -> str:
    """Runs one arm unless it is finished; returns a line to print."""
    where = folder(runs, task, arm, seed)
    if not finished(where):
        overrides = [
            f"run_dir={where}",
            f"seed={seed}",
            f"model.path={runs / task / 'start' / 'warm_start' / 'hf'}",
            "warm_start.steps=0",
            "launch.ranks=1",
            "baseline=",
            "eval.control_problems=0",
            *ARMS[arm],
        ]
        if arm != "icrl":
            budget = read(runs, task, "icrl", seed).generated_tokens
            overrides += arms.at_equal_cost(budget, steps=100_000)
        run(["train", task, *overrides], where.with_suffix(".log"))
    return str(read(runs, task, arm, seed))


def play(jobs: int, *groups: Sequence[Callable[[], str]]) -> None:
    """Runs one group after another, `jobs` runs at a time, and prints what each returns."""
    begun, console = time.monotonic(), Console(stderr=True)
    with ThreadPoolExecutor(jobs) as pool:
        for group in groups:
            for done in pool.map(lambda job: job(), group):
                console.print(f"{(time.monotonic() - begun) / 60:5.1f} min  {done}", highlight=False)


def run(arguments: list[str], log: Path, limit_s: float = JOB_LIMIT_S) -> None:
    """Runs one `icrl` command; if it fails, exits with the end of its log. A command that takes too long is ended, and
    resumes when it is run again."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "icrl_megatron.cli", *arguments]
    try:
        with log.open("w") as out:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=limit_s).returncode
    except subprocess.TimeoutExpired as late:
        raise SystemExit(
            f"{' '.join(arguments)} took longer than {limit_s:g} s: run this tool again to resume"
        ) from late
    if code:
        tail = "\n".join(log.read_text().splitlines()[-20:])
        raise SystemExit(f"{' '.join(arguments)} ended with {code}; {log} ends:\n{tail}")


def read(runs: Path, task: str, arm: str, seed: int) -> Result:
    rows = read_rows(folder(runs, task, arm, seed) / METRICS_FILE)
    evaluated = [row for row in rows if HELDOUT in row]
    timed = [name for name in rows[-1] if name.startswith("time/") and not name.endswith("per_s")]
    seconds = sum(row.get(name, 0.0) for row in rows for name in {*timed, "time/rollout_s", "time/train_s"})
    return Result(
        task=task,
        arm=arm,
        seed=seed,
        before=evaluated[0][HELDOUT],
        after=evaluated[-1][HELDOUT],
        steps=int(rows[-1]["step"]),
        generated_tokens=int(rows[-1]["tokens/generated_total"]),
        seconds=round(seconds, 1),
    )


def recorded(out: Path, below: int) -> list[Result]:
    """The results of seeds smaller than `below` that an earlier call recorded."""
    file = out.with_suffix(".json")
    if not below:
        return []
    if not file.is_file():
        raise SystemExit(f"--first-seed {below}: {file} with the results of earlier seeds is missing: leave it out")
    return [Result(**one) for one in json.loads(file.read_text())["results"] if one["seed"] < below]


def summary(results: list[Result], task: str, arm: str) -> str:
    return interval([r.after for r in results if (r.task, r.arm) == (task, arm)])


def interval(values: list[float]) -> str:
    """Mean over seeds with Student's 95 % interval, clipped to [0, 1], and each seed's value; a single value alone."""
    if len(values) < 2:
        return f"{values[0]:.0%}" if values else "-"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    low, high = max(0.0, mean(values) - half), min(1.0, mean(values) + half)
    return f"{mean(values):.0%} [{low:.0%}, {high:.0%}] ({', '.join(f'{v:.0%}' for v in values)})"


def table(results: list[Result]) -> Table:
    shown = Table("arm", *TASKS, title="Held-out critique-free success after training: mean [95 %] (seeds)")
    for arm in ARMS:
        shown.add_row(arm, *(summary(results, task, arm) for task in TASKS))
    return shown


def record(out: Path, begun: float, **content: object) -> None:
    """Writes JSON with the `content` and what it was made with; `begun` is on the monotonic clock."""
    out.parent.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "megatron-core", "transformers", "icrl-megatron")
    made = {
        "command": " ".join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "minutes_of_this_call": round((time.monotonic() - begun) / 60, 1),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in packages},
    }
    out.with_suffix(".json").write_text(json.dumps(made | content, indent=1) + "\n")


def write(results: list[Result], runs: Path, out: Path, begun: float, curves: bool) -> None:
    """Writes JSON with all results, a Markdown table and, with `curves`, the learning curves of all arms."""
    arms_changes = {arm: list(changes) for arm, changes in ARMS.items()}
    record(out, begun, arms=arms_changes, results=[asdict(r) for r in results])
    lines = ["| arm | " + " | ".join(TASKS) + " |", "| --- " * (len(TASKS) + 1) + "|"]
    lines += [f"| {arm} | " + " | ".join(summary(results, task, arm) for task in TASKS) + " |" for arm in ARMS]
    before = [f"{mean([r.before for r in results if r.task == t] or [0.0]):.0%}" for t in TASKS]
    lines.insert(2, "| before | " + " | ".join(before) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")

    def measured(task: str, arm: str) -> list[list[dict[str, float]]]:
        done = [r.seed for r in results if (r.task, r.arm) == (task, arm)]
        return [read_rows(folder(runs, task, arm, seed) / METRICS_FILE) for seed in done]

    if curves:
        arms_picture({task: {arm: measured(task, arm) for arm in ARMS} for task in TASKS}, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
