"""Tables of benchmark results and bars, and a plot of measured and predicted steps for results that have both.

python tools/bench_report.py benchmarks/*.json --out benchmarks/report
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import bench_schema
import matplotlib as mpl
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BAR_COLUMNS = ("benchmark", "bar", "value", "limit", "verdict")
COLUMNS = ("benchmark", "subject", "quantity", "measured", "predicted", "unit", "machine", "date")


def rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row per measurement, with the planner's prediction of the same quantity if the result has one."""
    found = []
    for result in results:
        name = result["benchmark"] + (f" {result['recipe']}" if "recipe" in result else "")
        predicted = result.get("predicted", {})
        for one in result["measurements"]:
            guess = predicted.get(one["quantity"]) if one["subject"] == "icrl" else None
            cells = (name, one["subject"], one["quantity"], f"{one['value']:.4g}", f"{guess:.4g}" if guess else "")
            found.append((*cells, one["unit"], result["machine"], result["date"]))
    return found


def bar_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row per bar."""
    return [(result["benchmark"], *bar.cells()) for result in results for bar in bench_schema.bars(result)]


def markdown(table: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> str:
    """The table, as Markdown."""
    lines = [columns, tuple("---" for _ in columns), *table]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(results: list[dict[str, Any]], path: Path) -> bool:
    """Plots measured and predicted seconds by phase for every result that has both. Returns False if none has."""
    both = [r for r in results if "predicted" in r]
    if not both:
        return False
    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(2.5 + 3 * len(both), 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, result in zip(figure.subplots(1, len(both), squeeze=False)[0], both, strict=True):
            medians = result["medians"]["icrl"]
            names = [name for name in medians if name.endswith("_s") and name != "step_s"]
            for label, values, x in (("measured", medians, 0), ("predicted", result["predicted"], 1)):
                bottom = 0.0
                for number, name in enumerate(names):
                    axes.bar(x, values[name], bottom=bottom, color=f"C{number}", label=name if x == 0 else None)
                    bottom += values[name]
                axes.text(x, bottom, label, ha="center", va="bottom")
            axes.set(title=f"{result['recipe']}, {result['gpus']} GPUs", ylabel="seconds per step", xticks=[])
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=140)
    return True


def main(
    files: Annotated[list[Path], typer.Argument(help="Results of the benchmarks.")],
    out: Annotated[Path, typer.Option(help="Name of the table (.md) and the plot (.png).")] = Path("benchmarks/report"),
) -> None:
    """Writes the table, and the plot if a result has a prediction."""
    try:
        results = [bench_schema.read(path) for path in files]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    text = markdown(rows(results))
    if judged := bar_rows(results):
        text += "\n" + markdown(judged, BAR_COLUMNS)
    print(text, end="")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    drawn = plot(results, out.with_suffix(".png"))
    print(f"written to {out.with_suffix('.md')}" + (f" and {out.with_suffix('.png')}" if drawn else ""))


if __name__ == "__main__":
    typer.run(main)
