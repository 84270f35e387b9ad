"""Measures the chosen parts of a benchmark, prints their figures and writes them with their bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import bench_schema
import typer
from bench_schema import Bar
from rich.console import Console
from rich.table import Table

from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.sandbox import Sandbox, SandboxLimits

Figures = dict[str, float]


def sandbox(what: str) -> Sandbox | None:
    """None, with a message, if this machine cannot create one."""
    try:
        made = Sandbox(SandboxLimits(10.0, 256 << 20))
        made.check()
    except ConfigError as error:
        Console().print(f"{what}: {error}", markup=False)
        return None
    return made


def measure(
    name: str,
    every: Mapping[str, Callable[[], Figures]],
    parts: Sequence[str] | None,
    limits: Mapping[str, tuple[float, bool]],
    packages: Sequence[str],
    out: Path | None,
    **more: object,
) -> None:
    """Measures the `parts` of `every`, by default all. `limits`: (limit, whether more is better) by "part figure".

    Raises BadParameter for an unknown part, and Exit with 1 if a bar is missed.
    """
    if unknown := set(parts or ()) - set(every):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(every)}")
    found = {part: figures for part, run in every.items() if part in (parts or every) and (figures := run())}
    shown = Table("what", "figure", "value")
    for what, figures in found.items():
        for figure, value in figures.items():
            shown.add_row(what, figure, f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}")
    Console().print(shown)
    values = {f"{part} {figure}": value for part, figures in found.items() for figure, value in figures.items()}
    judged = [Bar(bar, values[bar], *limit) for bar, limit in limits.items() if bar in values]
    if out is not None:
        report = bench_schema.about(tuple(packages)) | more | {"medians": found, "bars": judged}
        bench_schema.write(out, name, report)
    if not all(bar.held for bar in judged):
        raise typer.Exit(1)
