"""Plots of critique-free success against cost, for runs and for the arms of an ablation over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from icrl_megatron.report.bands import arm_band, evaluations, smoothed
from icrl_megatron.telemetry.metrics import CRITIQUE_FREE, GENERATED, HELDOUT
from icrl_megatron.utils.files import save_picture

if TYPE_CHECKING:
    from icrl_megatron.telemetry.writer import MetricsRow

COLOURS = ("#d1495b", "#30638e", "#edae49", "#00798c", "#7d5ba6", "#6b705c")


@contextmanager
def drawing(path: Path, width: float, height: float, font_size: int) -> Iterator[Figure]:
    """A figure of this size in inches, which is written as a PNG when the block ends. Raises ConfigError on disk
    errors."""
    with mpl.rc_context({"font.size": font_size, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        save_picture(figure, path)


def learning_curve(runs: Sequence[tuple[str, Sequence[MetricsRow]]], path: str | Path, title: str = "") -> Path:
    """Draws critique-free success over generated tokens (left) and steps (right), one color per run, as a PNG.

    Thin lines are each step's training success, thick lines their running mean, circles held-out evaluations.
    `runs` are (label, rows of metrics.jsonl); rows may lack any of the metrics.
    """
    with drawing(Path(path), 11, 4.4, font_size=11) as figure:
        by_tokens, by_steps = figure.subplots(1, 2, sharey=True)
        for number, (label, rows) in enumerate(runs):
            colour = COLOURS[number % len(COLOURS)]
            tokens = list(accumulate(row.get(GENERATED, 0.0) for row in rows))
            _draw(by_tokens, [t / 1e6 for t in tokens], rows, label, colour)
            _draw(by_steps, [row["step"] for row in rows], rows, label, colour)
        by_tokens.set(xlabel="generated tokens (millions)", ylabel="critique-free success", ylim=(-0.02, 1.02))
        by_steps.set(xlabel="step")
        for axes in (by_tokens, by_steps):
            axes.grid(alpha=0.25, linewidth=0.7)
        handles, labels = by_tokens.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
        if title:
            figure.suptitle(title)
    return Path(path)


def _draw(axes: Axes, costs: Sequence[float], rows: Sequence[MetricsRow], label: str, colour: str) -> None:
    trained = _points(costs, rows, CRITIQUE_FREE)
    if trained:
        x, y = zip(*trained, strict=True)
        axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.9)
        axes.plot(x, smoothed(y), color=colour, linewidth=2.2, label=f"{label}, training")
    heldout = _points(costs, rows, HELDOUT)
    if heldout:
        x, y = zip(*heldout, strict=True)
        axes.plot(
            x, y, "o--", color=colour, markeredgecolor="white", markersize=8, linewidth=1, label=f"{label}, held-out"
        )


def _points(costs: Sequence[float], rows: Sequence[MetricsRow], name: str) -> list[tuple[float, float]]:
    return [(c, row[name]) for c, row in zip(costs, rows, strict=True) if math.isfinite(row.get(name, math.nan))]


def arms_picture(curves: Mapping[str, Mapping[str, Sequence[Sequence[MetricsRow]]]], path: str | Path) -> Path:
    """Draws held-out critique-free success over generated tokens: one panel per task, one color per arm, a thin line
    per seed, a thick one for their mean at common costs and a band for its 95 % interval over the seeds.
    `curves[task][arm]` holds the rows of each seed's metrics."""
    with drawing(Path(path), 4.2 * len(curves), 4.2, font_size=10) as figure:
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axes, (task, arms) in zip(panels, curves.items(), strict=True):
            for number, (arm, seeds) in enumerate(arms.items()):
                _draw_arm(axes, seeds, arm, COLOURS[number % len(COLOURS)])
            axes.set(title=task, xlabel="generated tokens (thousands)", ylim=(-0.02, 1.02))
            axes.grid(alpha=0.25, linewidth=0.7)
        panels[0].set_ylabel("held-out success without critique")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    return Path(path)


def _draw_arm(axes: Axes, seeds: Sequence[Sequence[MetricsRow]], label: str, colour: str) -> None:
    whole = arm_band(seeds)
    if not whole.seeds:
        return
    for rows in seeds:
        x, y = evaluations(rows)
        axes.plot([t / 1e3 for t in x], y, color=colour, alpha=0.25, linewidth=0.9)
    thousands = [t / 1e3 for t in whole.x]
    if whole.seeds > 1:
        axes.fill_between(thousands, whole.low, whole.high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(thousands, whole.mean, color=colour, linewidth=2.2, label=label)
