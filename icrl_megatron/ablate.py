"""`icrl ablate RECIPE`: the paper's comparison, one run after another (or each as a job of its own), and its table.

A cell is one arm with one seed, a run of its own under <out>/<arm>_<seed>. What is finished is not run again, and what
was interrupted goes on, so the same command ends where it left off.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from icrl_megatron import settings as settings_module
from icrl_megatron.config import ConfigError, Settings
from icrl_megatron.report import outcome
from icrl_megatron.rollout.intervals import Difference, paired_difference
from icrl_megatron.settings import SAVED_NAME
from icrl_megatron.telemetry.files import write_atomically
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows

START = "start"
ARMS: dict[str, tuple[str, ...]] = {
    "icrl": (),
    "grpo": ("rollout.rounds=1", "algo.calibration.enabled=false"),
    "critique_grpo": (
        *("rollout.critic=frozen", "algo.group_by=task_role", "algo.calibration.enabled=false"),
        "algo.normalise_std=false",
    ),
    "frozen_critic": ("rollout.critic=frozen",),
    "no_calibration": ("algo.calibration.enabled=false",),
    "no_role_groups": ("algo.group_by=task",),
    "not_internalised": ("algo.internalise=false",),
    "recomputed": ("algo.calibration.denominator=recomputed",),
    "reference": ("algo.preset=reference",),
}
"""What each arm changes of the recipe; docs/BASELINES.md says why."""


@dataclass(frozen=True)
class Plan:
    """What was asked for."""

    recipe: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    overrides: tuple[str, ...] = ()
    budget_of: str = ""
    """Arm whose generated tokens, seed by seed, end every other arm's training; empty: all arms run the same steps."""

    def cells(self) -> list[tuple[str, int]]:
        """The arm that sets the budget first."""
        arms = sorted(self.arms, key=lambda arm: arm != self.budget_of)
        return [(arm, seed) for arm in arms for seed in self.seeds]

    def folder(self, arm: str, seed: int) -> Path:
        return self.out / f"{arm}_{seed}"


@dataclass(frozen=True)
class Arm:
    """One row of the table."""

    arm: str
    seeds: int
    success: Difference
    """Held-out critique-free success after training: mean over seeds with a bootstrap interval over seeds."""
    by_task: dict[str, float]
    tokens: float
    """Generated in training, mean over seeds."""
    steps: float
    critique_tokens: float | None
    """Mean length of a critique over the last tenth of training; None where nobody was criticised."""


def parse(recipe: str, arms: str, seeds: str, out: Path, overrides: Sequence[str], budget_of: str) -> Plan:
    """Raises ConfigError on an unknown arm, a seed that is none, and settings that the recipe does not take."""
    chosen = tuple(ARMS) if arms == "all" else tuple(a.strip() for a in arms.split(",") if a.strip())
    for arm in (*chosen, *([budget_of] if budget_of else [])):
        if arm not in ARMS:
            raise ConfigError(f"--arms: no arm {arm!r}; choose from {', '.join(ARMS)}, or all")
    if budget_of and budget_of not in chosen:
        raise ConfigError(f"--budget-of={budget_of}: that arm is not among --arms; add it")
    try:
        numbers = tuple(dict.fromkeys(int(s) for s in seeds.split(",")))
    except ValueError as error:
        raise ConfigError(f"--seeds={seeds}: write whole numbers with commas, e.g. 0,1,2") from error
    for arm in chosen:  # before anything runs
        settings_module.load(recipe, [*overrides, *ARMS[arm]])
    return Plan(recipe, chosen, numbers, out, tuple(overrides), budget_of)


def run(plan: Plan, cell: int | None = None) -> int:
    """Runs what is missing, all of it or one cell (counted from 0); returns the exit code of the first that failed."""
    cells = plan.cells()
    if cell is not None and not 0 <= cell < len(cells):
        raise ConfigError(f"--cell={cell}: there are cells 0 to {len(cells) - 1}")
    words = start_words(plan)
    if words and (code := _icrl(words)):
        return code
    for arm, seed in cells if cell is None else [cells[cell]]:
        if finished(plan.folder(arm, seed)):
            continue
        if code := _icrl(cell_words(plan, arm, seed)):
            return code
    return 0


def finished(folder: Path) -> bool:
    return (folder / "report.json").exists()


def start_words(plan: Plan) -> list[str]:
    """The command of the warm start that all cells share; empty where none is needed, or it is done."""
    folder = _shared_start(plan)
    if folder is None or (folder / "warm_start" / "hf").exists():
        return []
    return ["sft", plan.recipe, *plan.overrides, f"run_dir={folder}"]


def cell_words(plan: Plan, arm: str, seed: int) -> list[str]:
    """The command of one cell: `train`, the recipe and what this cell changes of it.

    Raises ConfigError where another cell sets the budget and is not finished."""
    folder = _shared_start(plan)
    model = [] if folder is None else [f"model.path={folder / 'warm_start' / 'hf'}"]
    fixed = [f"run_dir={plan.folder(arm, seed)}", f"name={arm}", f"seed={seed}", *model]
    changes = [*plan.overrides, *fixed, "warm_start.steps=0", "baseline=", *ARMS[arm]]
    if plan.budget_of and arm != plan.budget_of:
        if not finished(plan.folder(plan.budget_of, seed)):
            raise ConfigError(
                f"arm {plan.budget_of!r} with seed {seed} sets the budget and is not finished: run it first"
            )
        rows = read_rows(plan.folder(plan.budget_of, seed) / METRICS_FILE)
        changes += [f"max_generated_tokens={int(rows[-1]['tokens/generated_total'])}", "steps=1000000"]
        # An arm that finds nothing pays for it like any other.
        changes += ["algo.on_no_signal=skip", "algo.max_resamples=0"]
    return ["train", plan.recipe, *changes]


def _shared_start(plan: Plan) -> Path | None:
    """The run folder of the shared warm start; None where the recipe names a model and warms nothing up."""
    settings = settings_module.load(plan.recipe, plan.overrides)
    return None if settings.model.path and settings.warm_start.steps == 0 else plan.out / START


def _icrl(arguments: list[str]) -> int:
    """One `icrl` command with our terminal; a signal to us reaches it too. It has time limits of its own."""
    return subprocess.run([sys.executable, "-m", "icrl_megatron.cli", *arguments], check=False).returncode


def results(plan: Plan) -> list[Arm]:
    """The rows of the arms that have finished cells."""
    found = []
    for arm in plan.arms:
        folders = [plan.folder(arm, seed) for seed in plan.seeds if finished(plan.folder(arm, seed))]
        if folders:
            found.append(_arm(arm, folders))
    return found


def _arm(arm: str, folders: Sequence[Path]) -> Arm:
    outcomes = [outcome(arm, folder, _settings(folder)) for folder in folders]
    values = [mean(p.mean for p in o.after.values()) for o in outcomes]
    lengths = [
        r["critique/tokens"] for o in outcomes for r in o.rows[-max(1, len(o.rows) // 10) :] if "critique/tokens" in r
    ]
    return Arm(
        arm=arm,
        seeds=len(folders),
        success=paired_difference(np.asarray(values, dtype=np.float64)),
        by_task={name: mean(o.after[name].mean for o in outcomes) for name in outcomes[0].after},
        tokens=mean(o.generated_tokens for o in outcomes),
        steps=mean(o.rows[-1]["step"] for o in outcomes),
        critique_tokens=mean(lengths) if lengths else None,
    )


def _settings(folder: Path) -> Settings:
    return settings_module.load_saved(folder / SAVED_NAME)


def table(arms: Sequence[Arm]) -> Table:
    shown = Table(
        title="Held-out success without a critique, %", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    tasks = list(arms[0].by_task) if arms else []
    shown.add_column("arm")
    for column in ("seeds", "mean [95 % over seeds]", *tasks, "tokens", "steps", "tokens a critique"):
        shown.add_column(column, justify="right")
    for a in arms:
        interval = f" [{100 * a.success.low:.1f}, {100 * a.success.high:.1f}]" if a.seeds > 1 else ""
        critique = "-" if a.critique_tokens is None else f"{a.critique_tokens:.0f}"
        cells = [f"{100 * a.success.mean:.1f}{interval}", *(f"{100 * a.by_task[t]:.1f}" for t in tasks)]
        shown.add_row(a.arm, str(a.seeds), *cells, f"{a.tokens:,.0f}", f"{a.steps:.0f}", critique)
    return shown


def write(plan: Plan, arms: Sequence[Arm]) -> None:
    """ablation.json, ablation.md and ablation.png in the plan's folder."""
    from icrl_megatron.telemetry.plots import arms_picture

    write_atomically(plan.out / "ablation.json", [json.dumps([asdict(a) for a in arms], indent=1)])
    lines = ["| arm | seeds | success | tokens |", "| --- | ---: | ---: | ---: |"]
    for a in arms:
        share = f"{100 * a.success.mean:.1f} [{100 * a.success.low:.1f}, {100 * a.success.high:.1f}]"
        lines.append(f"| {a.arm} | {a.seeds} | {share} | {a.tokens:,.0f} |")
    write_atomically(plan.out / "ablation.md", lines)
    curves = {
        a.arm: [read_rows(plan.folder(a.arm, s) / METRICS_FILE) for s in plan.seeds if finished(plan.folder(a.arm, s))]
        for a in arms
    }
    arms_picture({plan.recipe: curves}, plan.out / "ablation.png")


def conclude(plan: Plan) -> None:
    """Writes the files of what is finished and prints its table; nothing where nothing is."""
    if found := results(plan):
        write(plan, found)
        Console().print(table(found))
