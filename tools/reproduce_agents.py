"""What tools, distillation and RL each contribute on Archive, on two CPU cores: `make reproduce-agents`.

For each seed: a model that learned answers only, RL from random weights, the supervised start (the task's own teacher),
and from that start GRPO, ICRL, and ICRL with a cost per call. ICRL runs a fixed number of steps; every other RL arm
stops when it has generated as many tokens. Every model is then evaluated on all held-out problems, without critiques.
Finished runs are skipped, so the same command resumes an interrupted reproduction.

    python tools/reproduce_agents.py [--out benchmarks/reproduce_agents] [--runs runs/agents] [--seeds 3] [--jobs 2]
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from reproduce_small import interval, play, record, run
from rich.console import Console

from icrl_megatron.settings.arms import at_equal_cost
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows

CALL_COST = 0.05
"""Of the reward of a right answer, which takes five calls."""
SAMPLES = 4
"""Evaluated attempts at each held-out problem."""
EDGE = 5
"""Steps at either end of a run over which calls and tokens are averaged."""


@dataclass(frozen=True)
class Arm:
    name: str
    start: str
    """A supervised stage of STARTS, or "" for random weights."""
    changes: tuple[str, ...] | None
    """Settings of the RL stage; None: there is none."""


STARTS = {"answers": ("tasks.sources=[{name: archive_answers}]",), "sft": ()}
"""Supervised stages and what they change of the recipe."""
GRPO = ("rollout.rounds=1",)
ARMS = (
    Arm("answers only", "answers", None),
    Arm("RL only (GRPO)", "", GRPO),
    Arm("SFT only", "sft", None),
    Arm("SFT, then GRPO", "sft", GRPO),
    Arm("SFT, then ICRL", "sft", ()),
    Arm("SFT, then ICRL, calls cost", "sft", (f"rollout.call_cost={CALL_COST}",)),
)
ICRL = ARMS[4]


@dataclass(frozen=True)
class Result:
    """One model. Calls and tokens are per attempt without a critique, of the training problems."""

    arm: str
    seed: int
    success: float
    """Share of held-out attempts that succeed."""
    steps: int
    generated_tokens: int
    calls: tuple[float, float] | None
    """Over the first and the last steps of RL; None without RL."""
    invalid_calls: tuple[float, float] | None
    """Of 1: calls that could not be made."""
    tokens: tuple[float, float] | None


def main(
    out: Annotated[Path, typer.Option(help="Stem of the .json and .md that are written.")] = Path(
        "benchmarks/reproduce_agents"
    ),
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/agents"),
    seeds: int = 3,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one core each.")] = 2,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="A setting for every run, such as steps=2.")
    ] = None,
) -> None:
    """Runs the missing runs and evaluations, then writes the table."""
    begun, more = time.monotonic(), tuple(override or ())
    # ICRL first: its token count is the budget of the other arms.
    play(
        jobs,
        [partial(supervise, runs, name, seed, more) for seed in range(seeds) for name in STARTS],
        [partial(finish, runs, ICRL, seed, more) for seed in range(seeds)],
        [partial(finish, runs, arm, seed, more) for seed in range(seeds) for arm in ARMS if arm != ICRL],
    )
    results = [read(runs, arm, seed) for arm in ARMS for seed in range(seeds)]
    write(results, out, begun)
    Console(stderr=True).print(out.with_suffix(".md").read_text())


def folder(runs: Path, arm: Arm, seed: int) -> Path:
    plain = "".join(c if c.isalnum() else "_" for c in arm.name.lower())
    return runs / f"{plain}_{seed}" if arm.changes is not None else runs / f"{arm.start}_{seed}" / "warm_start"


def supervise(runs: Path, name: str, seed: int, more: tuple[str, ...]) -> str:
    where = runs / f"{name}_{seed}"
    if not (where / "warm_start" / "hf").exists():
        run(["sft", "archive", f"run_dir={where}", f"seed={seed}", *STARTS[name], *more], where.with_suffix(".log"))
    return f"supervised start {where.name}"


def finish(runs: Path, arm: Arm, seed: int, more: tuple[str, ...]) -> str:
    """Trains and evaluates one arm unless it is finished; returns a line to print."""
    where = folder(runs, arm, seed)
    if arm.changes is not None and not (where / "hf").exists():
        start = (f"model.path={runs / f'{arm.start}_{seed}' / 'warm_start' / 'hf'}",) if arm.start else ()
        own = [*more, "warm_start.steps=0", "eval.interval=0", "eval.control_problems=0", *start, *arm.changes]
        if arm != ICRL:
            own += at_equal_cost(spent(folder(runs, ICRL, seed)), steps=100_000)
        run(["train", "archive", f"run_dir={where}", f"seed={seed}", *own], where.with_suffix(".log"))
    if not (where / "eval" / "eval.json").exists():
        words = ["eval", str(where / "hf"), "--task", "archive", "--samples", str(SAMPLES)]
        run([*words, "--out", str(where / "eval")], where.parent / f"{where.name}_{seed}_eval.log")
    return str(read(runs, arm, seed))


def spent(where: Path) -> int:
    return int(read_rows(where / METRICS_FILE)[-1]["tokens/generated_total"])


def read(runs: Path, arm: Arm, seed: int) -> Result:
    where = folder(runs, arm, seed)
    success = json.loads((where / "eval" / "eval.json").read_text())["scores"][-1]["average"]["mean"]
    if arm.changes is None:
        return Result(arm.name, seed, success, 0, 0, None, None, None)
    rows = [row for row in read_rows(where / METRICS_FILE) if "task/calls" in row]

    def ends(value: str, of: str = "") -> tuple[float, float]:
        first, last = ([r[value] / (r[of] if of else 1.0) for r in part] for part in (rows[:EDGE], rows[-EDGE:]))
        return round(mean(first), 4), round(mean(last), 4)

    calls, invalid = ends("task/calls"), ends("task/calls_invalid", "task/calls")
    return Result(arm.name, seed, success, len(rows), spent(where), calls, invalid, ends("attempt/tokens"))


def write(results: list[Result], out: Path, begun: float) -> None:
    record(out, begun, results=[asdict(result) for result in results])
    lines = [
        "| arm | held-out success: mean [95 %] (seeds) | calls, first and last steps | invalid | tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        own = [result for result in results if result.arm == arm.name]
        cells = [interval([result.success for result in own])]
        cells += [_change([r.calls for r in own], "{:.1f}"), _change([r.invalid_calls for r in own], "{:.1%}")]
        lines.append(f"| {arm.name} | " + " | ".join([*cells, _change([r.tokens for r in own], "{:.0f}")]) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _change(pairs: list[tuple[float, float] | None], form: str) -> str:
    known = [pair for pair in pairs if pair is not None]
    return " to ".join(form.format(mean(values)) for values in zip(*known, strict=True)) if known else ""


if __name__ == "__main__":
    typer.run(main)
