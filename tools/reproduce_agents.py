"""What tools, distillation and RL each contribute on Archive, on two CPU cores: `make reproduce-agents`.

For each seed: a model that learned answers only, RL from random weights, the supervised start (the task's own teacher),
and from that start GRPO, ICRL, and ICRL with a cost per call. Then distillation: the scripted multi-agent system
itself, models that learned from all of its trajectories, from the filtered ones, and from those without one of the
filters, and GRPO from the filtered start. A filter that drops and copies nothing leaves the same file as another start
has; the table says so, and the model is trained once. Then two rounds of self-distillation: the supervised start plays
with itself as the critic and learns from its filtered trajectories, and its successor does the same. ICRL runs a fixed
number of steps; every other RL arm stops when it has generated as many tokens. Every model is then evaluated on all
held-out problems, without critiques. Finished runs are skipped, so the same command resumes an interrupted
reproduction. Results of other arms stay in the file that is written, with the command that measured them in `earlier`.

    python tools/reproduce_agents.py [--out benchmarks/reproduce_agents] [--runs runs/agents] [--seeds 3] [--jobs 2]
    python tools/reproduce_agents.py --arm system --arm "distilled, filtered"      # some arms
"""

from __future__ import annotations

import filecmp
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from reproduce_small import interval, play, record, run
from rich.console import Console

from icrl_megatron.settings.arms import at_equal_cost
from icrl_megatron.settings.distill_schema import FILTERS
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows

CALL_COST = 0.05
"""Share of the reward of a right answer that each call costs. A right answer takes five calls."""
SAMPLES = 4
"""Evaluated attempts at each held-out problem."""
TRAINING_LIMIT_S = 6 * 3600.0
"""For one command that trains. By RL from random weights, a step takes longer than after a supervised start."""
EDGE = 5
"""Steps at either end of a run over which calls and tokens are averaged."""


@dataclass(frozen=True)
class Arm:
    name: str
    start: str
    """A supervised stage of STARTS, or "" for random weights."""
    changes: tuple[str, ...] | None
    """Settings of the RL stage; None: there is none."""


@dataclass(frozen=True)
class Start:
    """A supervised stage of the recipe."""

    changes: tuple[str, ...] = ()
    left_out: tuple[str, ...] | None = None
    """It learns from the system's trajectories without these filters. None: from the task's teacher."""
    plays: str = ""
    """A start whose model is the system, plays each problem once, and is then trained further. Empty: the scripted
    system plays, and a model with random weights is trained."""


LONG, LONGEST = ("warm_start.steps=2000",), ("warm_start.steps=4000",)
"""Twice and four times the recipe's steps: after fewer, a model's success depends much on its seed."""
STARTS = {
    "answers": Start(("tasks.sources=[{name: archive_answers}]",)),
    "sft": Start(),
    "distilled": Start(left_out=()),
    "unfiltered": Start(left_out=FILTERS),
    **{f"without_{name}": Start(left_out=(name,)) for name in FILTERS},
    "unfiltered_long": Start(LONG, left_out=FILTERS),
    "distilled_long": Start(LONG, left_out=()),
    "unfiltered_longest": Start(LONGEST, left_out=FILTERS),
    "distilled_longest": Start(LONGEST, left_out=()),
    "self_1": Start(left_out=(), plays="sft"),
    "self_2": Start(left_out=(), plays="self_1"),
}
GRPO = ("rollout.rounds=1",)
ARMS = (
    Arm("answers only", "answers", None),
    Arm("RL only (GRPO)", "", GRPO),
    Arm("SFT only", "sft", None),
    Arm("SFT, then GRPO", "sft", GRPO),
    Arm("SFT, then ICRL", "sft", ()),
    Arm("SFT, then ICRL, calls cost", "sft", (f"rollout.call_cost={CALL_COST}",)),
    Arm("distilled, all trajectories", "unfiltered", None),
    Arm("distilled, filtered", "distilled", None),
    *(Arm(f"distilled without {name}", f"without_{name}", None) for name in FILTERS),
    Arm("distilled, all trajectories, 2000 steps", "unfiltered_long", None),
    Arm("distilled, filtered, 2000 steps", "distilled_long", None),
    Arm("distilled, all trajectories, 4000 steps", "unfiltered_longest", None),
    Arm("distilled, filtered, 4000 steps", "distilled_longest", None),
    Arm("distilled, filtered, then GRPO", "distilled", GRPO),
    Arm("self-distilled, round 1", "self_1", None),
    Arm("self-distilled, round 2", "self_2", None),
)
ICRL = ARMS[4]
SYSTEM = "system"
"""The scripted multi-agent system itself, on the training problems that it plays."""


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
    """Share of calls that could not be made, in [0, 1]."""
    tokens: tuple[float, float] | None
    written: float
    """Tokens written per attempt: by a model on the held-out problems; by the system in words, over all its agents."""
    read: float
    """Tokens read per attempt. A model reads its prompt and the observations once, in one sequence. The system's agents
    read their prompts anew for each reply."""
    same_as: str = ""
    """The start with the same trajectories, whose model this is; empty: the arm has its own."""


def main(
    out: Annotated[Path, typer.Option(help="Stem of the .json and .md that are written.")] = Path(
        "benchmarks/reproduce_agents"
    ),
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/agents"),
    seeds: int = 3,
    jobs: Annotated[int, typer.Option(help="Runs at a time, one core each.")] = 2,
    arm: Annotated[list[str] | None, typer.Option(help="Only these arms.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="A setting for every run, such as steps=2.")
    ] = None,
) -> None:
    """Runs the missing runs and evaluations, then writes the table."""
    begun, more = time.monotonic(), tuple(override or ())
    if unknown := set(arm or ()) - {SYSTEM, *(one.name for one in ARMS)}:
        raise typer.BadParameter(f"no arm {', '.join(unknown)}; there are {SYSTEM}; {'; '.join(a.name for a in ARMS)}")
    arms = [one for one in ARMS if not arm or one.name in arm]
    # ICRL first: its token count is the budget of the other RL arms.
    first = [ICRL] if any(one.changes is not None for one in arms) else []
    starts = list(dict.fromkeys(name for one in (*first, *arms) for name in line(one.start)))
    filtered = [name for name in STARTS if STARTS[name].left_out is not None and not STARTS[name].plays]
    later = [name for name in starts if STARTS[name].plays]
    with_system = not arm or SYSTEM in arm or not set(starts).isdisjoint(filtered)
    play(
        jobs,
        [partial(distill, runs, "distilled", seed, more) for seed in range(seeds) if with_system],
        [partial(distill, runs, n, seed, more) for seed in range(seeds) for n in starts if n in filtered[1:]],
    )
    learned = dict.fromkeys(
        (learner(runs, name, seed), seed) for seed in range(seeds) for name in starts if name not in later
    )
    rest: dict[Path, Callable[[], str]] = {}
    for seed in range(seeds):
        for one in arms:
            if one not in first:
                rest.setdefault(folder(runs, one, seed), partial(finish, runs, one, seed, more))
    play(
        jobs,
        [partial(supervise, runs, name, seed, more) for name, seed in learned],
        [partial(go_on, runs, later, seed, more) for seed in range(seeds) if later],
        [partial(finish, runs, one, seed, more) for seed in range(seeds) for one in first],
        list(rest.values()),
    )
    results = [of_system(runs, seed) for seed in range(seeds) if with_system]
    results += [read(runs, one, seed) for one in arms for seed in range(seeds)]
    write(results, out, begun)
    Console(stderr=True).print(out.with_suffix(".md").read_text())


def line(start: str) -> list[str]:
    """A start after those that it needs."""
    return [*line(STARTS[start].plays), start] if start else []


def folder(runs: Path, arm: Arm, seed: int) -> Path:
    plain = "".join(c if c.isalnum() else "_" for c in arm.name.lower())
    return runs / f"{plain}_{seed}" if arm.changes is not None else started(runs, arm.start, seed)


def started(runs: Path, name: str, seed: int) -> Path:
    """The supervised run of a start."""
    return runs / f"{learner(runs, name, seed)}_{seed}" / "warm_start"


def learner(runs: Path, name: str, seed: int) -> str:
    """The start that trains on these trajectories: the first one of STARTS with the same changes and the same file."""
    own = traces(runs, name, seed)
    if STARTS[name].left_out is None or not own.exists():
        return name
    alike = [o for o, start in STARTS.items() if start.left_out is not None and start.changes == STARTS[name].changes]
    files = {other: traces(runs, other, seed) for other in alike}
    same = (other for other, file in files.items() if file.exists() and filecmp.cmp(file, own, shallow=False))
    return next(same)


def traces(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name}_{seed}.jsonl"


def distill(runs: Path, name: str, seed: int, more: tuple[str, ...]) -> str:
    """Writes what the filters of a start keep. `distilled`, the first one, also lets the system play, and a start that
    plays itself."""
    out, start = traces(runs, name, seed), STARTS[name]
    if not out.exists():
        own = ("distill.system=model", "distill.attempts=1", *model(runs, name, seed)) if start.plays else ()
        if name != "distilled" and not start.plays:  # the same attempts, other filters
            played = traces(runs, "distilled", seed).with_suffix(".runs.jsonl")
            shutil.copyfile(played, out.with_suffix(".runs.jsonl"))
        left_out = f"distill.filters.leave_out=[{','.join(start.left_out or ())}]"
        run(["distill", "archive", "--out", str(out), f"seed={seed}", left_out, *own, *more], out.with_suffix(".log"))
    return f"trajectories {out.name}"


def model(runs: Path, name: str, seed: int) -> tuple[str, ...]:
    """The model that a start begins with; nothing for random weights."""
    plays = STARTS[name].plays
    return (f"model.path={started(runs, plays, seed) / 'hf'}",) if plays else ()


def go_on(runs: Path, names: list[str], seed: int, more: tuple[str, ...]) -> str:
    """Plays and trains rounds of self-distillation, each with the model of the one before."""
    for name in names:
        distill(runs, name, seed, more)
        supervise(runs, name, seed, more)
    return f"self-distilled {', '.join(names)} of seed {seed}"


def supervise(runs: Path, name: str, seed: int, more: tuple[str, ...]) -> str:
    where, start = runs / f"{name}_{seed}", STARTS[name]
    if not (where / "warm_start" / "hf").exists():
        data = [f"warm_start.data=[{{path: {traces(runs, name, seed)}, tool_format: tags}}]"]
        own = data if start.left_out is not None else []
        own += model(runs, name, seed)
        own += ["warm_start.bad_rows=drop"] if start.plays else []  # a model also writes the unknown word
        words = ["sft", "archive", f"run_dir={where}", f"seed={seed}", *start.changes, *own, *more]
        run(words, where.with_suffix(".log"), TRAINING_LIMIT_S)
    return f"supervised start {where.name}"


def finish(runs: Path, arm: Arm, seed: int, more: tuple[str, ...]) -> str:
    """Trains and evaluates one arm unless it is finished; returns a line to print."""
    where = folder(runs, arm, seed)
    if arm.changes is not None and not (where / "hf").exists():
        start = (f"model.path={started(runs, arm.start, seed) / 'hf'}",) if arm.start else ()
        own = [*more, "warm_start.steps=0", "eval.interval=0", "eval.control_problems=0", *start, *arm.changes]
        if arm != ICRL:
            own += at_equal_cost(spent(folder(runs, ICRL, seed)), steps=100_000)
        run(["train", "archive", f"run_dir={where}", f"seed={seed}", *own], where.with_suffix(".log"), TRAINING_LIMIT_S)
    if not (where / "eval" / "eval.json").exists():
        words = ["eval", str(where / "hf"), "--task", "archive", "--samples", str(SAMPLES)]
        run([*words, "--out", str(where / "eval")], where.parent / f"{where.name}_{seed}_eval.log")
    return str(read(runs, arm, seed))


def spent(where: Path) -> int:
    return int(read_rows(where / METRICS_FILE)[-1]["tokens/generated_total"])


def of_system(runs: Path, seed: int) -> Result:
    found = json.loads(traces(runs, "distilled", seed).with_suffix(".report.json").read_text())
    played = found["finished"]
    written, seen = (sum(of[kind] for of in found["tokens"].values()) / played for kind in ("written", "read"))
    return Result(SYSTEM, seed, found["right"] / played, 0, 0, None, None, None, written, seen)


def read(runs: Path, arm: Arm, seed: int) -> Result:
    where = folder(runs, arm, seed)
    score = json.loads((where / "eval" / "eval.json").read_text())["scores"][-1]
    success, cost = score["average"]["mean"], (score["attempt_tokens"], score["read_tokens"])
    if arm.changes is None:
        of = learner(runs, arm.start, seed)
        return Result(arm.name, seed, success, 0, 0, None, None, None, *cost, "" if of == arm.start else of)
    rows = [row for row in read_rows(where / METRICS_FILE) if "task/calls" in row]

    def ends(value: str, of: str = "") -> tuple[float, float]:
        first, last = ([r[value] / (r[of] if of else 1.0) for r in part] for part in (rows[:EDGE], rows[-EDGE:]))
        return round(mean(first), 4), round(mean(last), 4)

    calls, invalid = ends("task/calls"), ends("task/calls_invalid", "task/calls")
    return Result(arm.name, seed, success, len(rows), spent(where), calls, invalid, ends("attempt/tokens"), *cost)


def write(results: list[Result], out: Path, begun: float) -> None:
    others, earlier = kept(out.with_suffix(".json"), {result.arm for result in results})
    order = {name: place for place, name in enumerate((SYSTEM, *(arm.name for arm in ARMS)))}
    results = sorted([*results, *others], key=lambda result: order[result.arm])
    record(out, begun, earlier=earlier, results=[asdict(result) for result in results])
    lines = [
        "| arm | held-out success: mean [95 %] (seeds) | calls, first and last steps | invalid | tokens | "
        "tokens written, read |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in dict.fromkeys(result.arm for result in results):
        own = [result for result in results if result.arm == arm]
        cells = [interval([result.success for result in own])]
        cells += [_change([r.calls for r in own], "{:.1f}"), _change([r.invalid_calls for r in own], "{:.1%}")]
        cells += [_change([r.tokens for r in own], "{:.0f}")]
        cells += [f"{mean(r.written for r in own):.0f}, {mean(r.read for r in own):.0f}"]
        same = [f"{r.same_as} for seed {r.seed}" for r in own if r.same_as]
        note = f" (same trajectories as {', '.join(same)}: trained once)" if same else ""
        lines.append(f"| {arm}{note} | " + " | ".join(cells) + " |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def kept(file: Path, measured: set[str]) -> tuple[list[Result], list[dict[str, Any]]]:
    """(results of an earlier call for arms that this one did not measure, what they were made with)."""
    if not file.exists():
        return [], []
    saved = json.loads(file.read_text())
    pairs = ("calls", "invalid_calls", "tokens")
    found = [Result(**{k: tuple(v) if k in pairs and v else v for k, v in one.items()}) for one in saved["results"]]
    found = [one for one in found if one.arm not in measured]
    made = {name: saved[name] for name in ("command", "machine", "versions")}
    return found, [*saved.get("earlier", []), made] if found else []


def _change(pairs: list[tuple[float, float] | None], form: str) -> str:
    known = [pair for pair in pairs if pair is not None]
    return " to ".join(form.format(mean(values)) for values in zip(*known, strict=True)) if known else ""


if __name__ == "__main__":
    typer.run(main)
