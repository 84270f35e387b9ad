"""Shows an evaluation as tables in the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from icrl_megatron.evaluation.result import Result
from icrl_megatron.report.plots import COLOURS, drawing
from icrl_megatron.utils.console import PlainConsole


def _share(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


ROUNDS_A_TABLE = 3
"""Number of interval columns that fit in 80 characters beside a subset's name and the tokens of a critique."""


def show(result: Result, console: Console | None = None) -> None:
    """Prints the scores and, if there is one, the comparison, in 80 columns."""
    out = console or PlainConsole()
    out.print(scores_table(result))
    if result.rounds > 1:
        for first in range(0, result.rounds, ROUNDS_A_TABLE):
            out.print(rounds_table(result, first))
        out.print(transitions_table(result))
    if any(s.measures for s in result.scores):
        out.print(tools_table(result))
    if result.comparison:
        out.print(comparison_table(result))
        out.print(costs_table(result))
    out.print(f"{result.generated_tokens} tokens generated in {_seconds(result.seconds)}")
    for reason, rows in result.unusable.items():
        out.print(f"{rows} rows left out: {reason}", style="yellow")
    for reason in result.lost:
        out.print(f"lost episodes: {reason}", style="yellow")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")  # long names wrap, numbers do not
    for column in columns:
        table.add_column(column, justify="right")
    return table


def scores_table(result: Result) -> Table:
    columns = ["problems", f"avg@{result.samples}", f"pass@{result.samples}", "tokens", "lost"]
    table = _table(f"{result.model}: success without a critique in %, 95 % interval", columns)
    for s in result.scores:
        average, passed = (_share(e.mean, e.low, e.high) for e in (s.average, s.passed))
        table.add_row(s.subset, str(s.average.problems), average, passed, f"{s.attempt_tokens:.0f}", str(s.dropped))
    return table


def rounds_table(result: Result, first: int) -> Table:
    """Success by the end of each round, for the rounds from `first` on (counted from 0), and what a critique costs."""
    rounds = range(first, min(result.rounds, first + ROUNDS_A_TABLE))
    columns = [*(f"round {r + 1}" for r in rounds), "tokens per\ncritique"]
    table = _table(f"Success by round in %; critic: {result.critic}", columns)
    for s in result.scores:
        shares = (_share(s.rounds[r].mean, s.rounds[r].low, s.rounds[r].high) for r in rounds)
        table.add_row(s.subset, *shares, f"{s.critique_tokens:.0f}")
    return table


def transitions_table(result: Result) -> Table:
    columns = ("wrong to\nright", "right to\nwrong", "stayed\nwrong", "stayed\nright")
    table = _table("From an attempt to the revision after it", columns)
    for s in result.scores:
        t = s.transitions
        table.add_row(s.subset, *map(str, (t.wrong_to_right, t.right_to_wrong, t.stayed_wrong, t.stayed_right)))
    return table


def tools_table(result: Result) -> Table:
    """What all attempts read and counted, revisions included."""
    every = result.scores[-1]
    table = _table("Mean of all attempts", ["per attempt"])
    table.add_row("tokens read: prompt and observations, each once", f"{every.read_tokens:.0f}")
    for name, value in every.measures.items():
        table.add_row(name, f"{value:.2f}")
    return table


def comparison_table(result: Result) -> Table:
    columns = ("pairs", "difference", "only\nthis", "only the\nother", "McNemar\np")
    table = _table(f"Without a critique, against {result.against}: the same problems and seeds", columns)
    for c in result.comparison:
        difference = _share(c.difference.mean, c.difference.low, c.difference.high)
        table.add_row(c.subset, str(c.pairs), difference, str(c.only_first), str(c.only_second), f"{c.mcnemar_p:.3g}")
    return table


def costs_table(result: Result) -> Table:
    """What the two evaluations cost, each over all its own attempts, revisions included."""
    table, costs = _table("Costs", ["this", "the other"]), (result.costs(), result.costs_against)
    both = [one for one in costs if one is not None]

    def row(name: str, values: Sequence[str]) -> None:
        table.add_row(name, *values, *(["unknown"] if len(both) == 1 else []))

    row("attempts", [str(one.attempts) for one in both])
    row("tokens written per attempt", [f"{one.attempt_tokens:.0f}" for one in both])
    row("tokens read per attempt", [f"{one.read_tokens:.0f}" for one in both])
    row("time of all attempts together", [_seconds(one.seconds) for one in both])
    for name in sorted({name for one in both for name in one.measures}):
        row(name, [f"{one.measures[name]:.2f}" if name in one.measures else "-" for one in both])
    return table


def _seconds(value: float | None) -> str:
    return "unknown time" if value is None else f"{value:.1f} s"


def picture(result: Result, path: Path) -> Path:
    """Success after each round by subset, with intervals, as a PNG."""
    with drawing(path, max(5.0, 1.6 + 1.1 * len(result.scores)), 4.0, font_size=10) as figure:
        axes = figure.subplots()
        width = 0.8 / result.rounds
        for r in range(result.rounds):
            shares = [s.rounds[r] for s in result.scores]
            places = [i + (r - (result.rounds - 1) / 2) * width for i in range(len(shares))]
            means = [p.mean for p in shares]
            errors = [[p.mean - p.low for p in shares], [p.high - p.mean for p in shares]]
            label = "without critique" if r == 0 else f"after {r} critique{'s' if r > 1 else ''}"
            axes.bar(places, means, 0.9 * width, yerr=errors, capsize=3, color=COLOURS[r % len(COLOURS)], label=label)
        axes.set_xticks(range(len(result.scores)), [s.subset for s in result.scores], rotation=20, ha="right")
        axes.set(ylabel="success", ylim=(0, 1.02))
        figure.legend(loc="outside upper center", ncols=result.rounds, frameon=False)
    return path
