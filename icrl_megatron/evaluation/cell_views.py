"""The list of cells as tables for a terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.table import Table

from icrl_megatron.evaluation.cell_values import CellRun, Ours, Results, described
from icrl_megatron.utils.console import PlainConsole
from icrl_recipes.cells import PUBLISHED_IN, Cell, about

NOT_STATED = "not stated in our sources"
NOT_RUN = "not run"
SHA_SHOWN = len("sha256 ") + 12


def known(cells: Sequence[Cell]) -> dict[str, CellRun]:
    """What each recipe of the cells needs."""
    digests: dict[Path, str] = {}
    return {name: described(name, digests) for name in dict.fromkeys(r for cell in cells for r in cell.recipes)}


def show(cells: Sequence[Cell], seeds: Sequence[int], out: Path) -> None:
    """Prints every cell, the runs that they need, and the data of these."""
    runs, console = known(cells), PlainConsole()
    results = Results(out)
    found = {cell.name: results.of(cell) for cell in cells}
    for kind in dict.fromkeys((cell.table, cell.figure) for cell in cells):
        console.print(cells_table([c for c in cells if (c.table, c.figure) == kind], found, list(runs)))
    console.print(f"published: {PUBLISHED_IN}; -: {NOT_STATED}; runs: by their numbers below")
    console.print(runs_table(runs, seeds))
    console.print(data_table(runs))
    for note in dict.fromkeys(f"{cell.name}: {cell.note}" for cell in cells if cell.note):
        console.print(note)
    for name, one in found.items():
        if one.changed or one.lost:
            lost = f"{one.lost} episodes lost; " if one.lost else ""
            console.print(f"{name}, ours: {lost}{', '.join(one.changed)}".rstrip("; "), style="yellow")


def _table(title: str, columns: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def cells_table(cells: Sequence[Cell], found: Mapping[str, Ours], recipes: Sequence[str]) -> Table:
    """A table of cells with the same kind of number. Names stay on one line, so that they can be pasted."""
    table = _table(f"{cells[0].table}: {cells[0].figure.value}", ["cell", "runs", "paper", "ours"], ["paper", "ours"])
    for column in (0, 2, 3):
        table.columns[column].no_wrap = True
    for cell in cells:
        numbers = ",".join(str(recipes.index(name) + 1) for name in cell.recipes)
        published = "-" if cell.published is None else f"{cell.published:g}"
        table.add_row(cell.name, numbers, published, _shown(found[cell.name]))
    return table


def _shown(one: Ours) -> str:
    if one.value is None:
        return "begun" if one.begun else NOT_RUN
    seeds = f" ({len(one.by_seed)} seeds)" if len(one.by_seed) > 1 else ""
    return f"{one.value:.1f}{seeds}{' *' if one.changed or one.lost else ''}"


def runs_table(runs: Mapping[str, CellRun], seeds: Sequence[int]) -> Table:
    """Memory and GPU-hours are planned: `icrl plan`."""
    title = f"Runs, seeds {', '.join(map(str, seeds))}; planned: GiB of a GPU, GPU-hours of training for one seed"
    table = _table(title, ["", "recipe", "H100", "GiB", "GPU-hours", "data"], ["", "H100", "GiB", "GPU-hours"])
    for i, (name, run) in enumerate(runs.items(), start=1):
        entries = ", ".join(Path(one.entry).stem for one in run.data)
        table.add_row(str(i), name, str(run.gpus), f"{run.peak_gib:.0f}", f"{run.gpu_hours:,.0f}", entries)
    return table


def data_table(runs: Mapping[str, CellRun]) -> Table:
    table = _table("Data", ["entry", "state"])
    states = {one.entry: one.state for run in runs.values() for one in run.data}
    for entry, state in states.items():
        table.add_row(entry, state[:SHA_SHOWN] if state.startswith("sha256 ") else state)
    return table


def as_json(cells: Sequence[Cell], seeds: Sequence[int], out: Path) -> str:
    """A list with one object per cell."""
    runs, results = known(cells), Results(out)
    return json.dumps([_object(cell, seeds, runs, results.of(cell)) for cell in cells], indent=1)


def _object(cell: Cell, seeds: Sequence[int], runs: Mapping[str, CellRun], one: Ours) -> dict[str, object]:
    return {
        "cell": cell.name,
        "table": cell.table,
        "task": cell.task,
        "size": cell.size,
        "method": cell.method,
        "about": about(cell),
        "number": cell.figure.value,
        "seeds": list(seeds),
        "runs": [asdict(runs[name]) for name in cell.recipes],
        "evaluations": list(dict.fromkeys(reading.evaluation.name for reading in cell.readings)),
        "published": cell.published,
        "source": NOT_STATED if cell.published is None else PUBLISHED_IN,
        "note": cell.note,
        "ours": one.value if one.value is not None else NOT_RUN,
        "ours_by_seed": one.by_seed,
        "ours_changed": list(one.changed),
        "ours_lost": one.lost,
    }
