"""The report at the end of a run: success before and after, the learning curve, the control, and the output paths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from icrl_megatron.settings.arms import BASELINE
from icrl_megatron.settings.loading import run_folder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.metrics import HELDOUT, HELDOUT_ATTEMPTS
from icrl_megatron.telemetry.writer import METRICS_FILE, TENSORBOARD_FOLDER, MetricsRow, read_rows
from icrl_megatron.utils.console import PlainConsole
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.intervals import Proportion, proportion

CURVE = "learning_curve.png"
REPORT = "report.json"
_OF_TASKS = f"{HELDOUT}/"


@dataclass(frozen=True)
class RunOutcome:
    """Held-out critique-free success of one run before and after training, by task source."""

    label: str
    rows: list[MetricsRow]
    generated_tokens: int
    before: dict[str, Proportion]
    after: dict[str, Proportion]


def outcome(label: str, folder: Path, settings: Settings) -> RunOutcome:
    """Reads a finished run's metrics."""
    rows = read_rows(folder / METRICS_FILE)
    given = [source.name for source in settings.tasks.sources]
    # A user's own task set has a name of its own.
    names = [*given, *(k.removeprefix(_OF_TASKS) for row in rows for k in row if k.startswith(_OF_TASKS))]

    def measured(name: str) -> list[Proportion]:
        means = [
            (row[f"{_OF_TASKS}{name}"], int(row[f"{HELDOUT_ATTEMPTS}/{name}"]))
            for row in rows
            if f"{_OF_TASKS}{name}" in row
        ]
        return [proportion(round(mean * trials), trials) for mean, trials in means]

    found = {name: measured(name) for name in dict.fromkeys(names)}
    spent = int(rows[-1].get("tokens/generated_total", 0)) if rows else 0  # supervised training generates none
    before, after = ({name: of[i] for name, of in found.items() if of} for i in (0, -1))
    return RunOutcome(label, rows, spent, before, after)


def report(settings: Settings, console: Console | None = None) -> None:
    """Prints the report of a finished `icrl train`, and writes report.json and learning_curve.png beside it."""
    from icrl_megatron.report.plots import learning_curve

    console, folder = console or PlainConsole(), run_folder(settings)
    outcomes = [outcome("ICRL" if settings.rollout.rounds > 1 else "GRPO", folder, settings)]
    if settings.baseline:
        outcomes.append(outcome(settings.baseline.upper(), folder / BASELINE.format(settings.baseline), settings))
    console.print(success_table(outcomes))
    control = controls(folder)
    if any(control.values()):
        console.print(control_table(control))
    curve = learning_curve([(o.label, o.rows) for o in outcomes], folder / CURVE, settings.name)
    write_atomically(folder / REPORT, [json.dumps(_as_json(outcomes, control), indent=2)], "the report")
    console.print(_where(folder, curve))


def success_table(outcomes: list[RunOutcome]) -> Table:
    table = Table(title="Held-out success without a critique (95 % interval)", title_justify="left")
    for column in ("", "task", "before", "after", "generated tokens"):
        table.add_column(column, justify="left" if column in ("", "task") else "right")
    for one in outcomes:
        for name in one.after:
            table.add_row(
                one.label, name, _percent(one.before[name]), _percent(one.after[name]), f"{one.generated_tokens:,}"
            )
    return table


def control_table(controls: dict[str, dict[str, Any]]) -> Table:
    title = "Retries of failed held-out attempts that succeed (%, 95 % interval), by critique"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "task", "failed", "critique", "empty one", "none"):
        table.add_column(column, justify="left" if column in ("", "task") else "right")
    for when, by_task in controls.items():
        for name, arms in by_task.items():
            shares = [_short(Proportion(**arms[arm])) for arm in ("critique", "empty", "plain")]
            table.add_row(when, name, str(arms["failures"]), *(shares if arms["failures"] else ["-"] * 3))
    return table


def _percent(p: Proportion) -> str:
    return f"{p.mean:.0%} [{p.low:.0%}, {p.high:.0%}]"


def _short(p: Proportion) -> str:
    return f"{100 * p.mean:.0f} [{100 * p.low:.0f}, {100 * p.high:.0f}]"


def controls(run: Path) -> dict[str, dict[str, Any]]:
    """The run's control reports before and after training; empty for one that it lacks."""
    files = {when: run / f"control_{when}.json" for when in ("before", "after")}
    return {when: json.loads(file.read_text(encoding="utf-8")) if file.exists() else {} for when, file in files.items()}


def _as_json(outcomes: list[RunOutcome], controls: dict[str, Any]) -> dict[str, Any]:
    runs = [
        {
            "label": o.label,
            "generated_tokens": o.generated_tokens,
            "before": {name: vars(p) for name, p in o.before.items()},
            "after": {name: vars(p) for name, p in o.after.items()},
        }
        for o in outcomes
    ]
    return {"runs": runs, "control": controls}


def _where(folder: Path, curve: Path) -> str:
    lines = [
        f"learning curve  {curve}",
        f"checkpoint      {folder / 'checkpoints'}",
        f"Hugging Face    {folder / 'hf'}",
        f"TensorBoard     {folder / TENSORBOARD_FOLDER}",
        f"rollouts        {folder / 'rollouts'}",
        "",
        "next:",
        f"  icrl show {folder}                        # read an episode: attempt, critique, revision",
        f"  tensorboard --logdir {folder}",
        "  icrl recipes                              # what else there is to run",
        "  icrl train rulebook_hard steps=80 seed=1  # any setting can be overridden; add --dry-run to see them all",
    ]
    return "\n".join(lines)
