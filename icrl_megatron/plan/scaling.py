"""How a plan scales over numbers of GPUs, and the picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icrl_megatron.plan.hardware import Gpu
from icrl_megatron.plan.layout import Layout
from icrl_megatron.plan.models import shape_of
from icrl_megatron.plan.planner import Plan, episodes, grown, of_layout, ranks
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import PICTURE_MARK
from icrl_megatron.utils.result_files import begins_with, check_file

GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
GROUPS = {
    "rollout": ("prefill", "decode", "environments", "tools"),
    "scoring": ("scoring",),
    "training": ("training", "optimizer"),
    "collectives, bubbles": ("tensor collectives", "context exchange", "data collectives", "bubbles"),
    "sync, other": ("sync", "offload", "host", "other"),
}


@dataclass(frozen=True)
class Point:
    """One number of GPUs, with the recipe's own batch, and with one that grows with the GPUs. A plan may not fit; it is
    None where the grid cannot be, which the refusal beside it says."""

    gpus: int
    same_batch: Plan | None
    refusal: str
    grown_batch: Plan | None
    grown_refusal: str


def scale(settings: Settings, gpu: Gpu) -> list[Point]:
    """Plans for 8 to 1024 GPUs; the grown batch has as many tasks a GPU as the recipe has on its own GPUs."""
    points = []
    for gpus in GPU_COUNTS:
        same, refusal = _at(settings, gpus, gpu)
        bigger, grown_refusal = _at(grown(settings, gpus / ranks(settings)), gpus, gpu)
        points.append(Point(gpus, same, refusal, bigger, grown_refusal))
    return points


def _at(settings: Settings, gpus: int, gpu: Gpu) -> tuple[Plan | None, str]:
    shape, layout = shape_of(settings), Layout.of(settings, gpus)
    refusal = layout.refusal(shape, episodes(settings))
    return (None, refusal) if refusal else (of_layout(settings, shape, layout, gpu), "")


def fitting(points: list[Point], grown_batch: bool) -> list[tuple[int, Plan]]:
    """(index of the point, plan) of those that can be run."""
    plans = [point.grown_batch if grown_batch else point.same_batch for point in points]
    return [(i, plan) for i, plan in enumerate(plans) if plan is not None and plan.fits]


def efficiency(points: list[Point], plan: Plan) -> float:
    """Tokens a second and GPU, as a share of those of the grown batch on the fewest GPUs that it fits."""
    return plan.tokens_a_second_a_gpu / fitting(points, grown_batch=True)[0][1].tokens_a_second_a_gpu


def require_writable(path: Path, overwrite: bool = False) -> None:
    """Raises ConfigError where no picture can be written, or would replace another file, before anything is worked out
    for it."""
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"--picture {path}: {wrong}; give a file, e.g. --picture scaling.png")
    check_file(path, "a picture", begins_with(b"\x89PNG", PICTURE_MARK), overwrite)


def picture(points: list[Point], path: Path, title: str) -> Path:
    """Step time by phase and efficiency over the number of GPUs, as a PNG that says that it is predicted. What does not
    fit is left out. Raises ConfigError where nothing fits, or the file cannot be written."""
    from icrl_megatron.report.plots import drawing

    if not fitting(points, grown_batch=True):
        raise ConfigError(f"--picture {path}: nothing to draw, the run fits none of {', '.join(map(str, GPU_COUNTS))}")
    with drawing(path, 12, 5.2, font_size=11) as figure:
        left, right = figure.subplots(1, 2)
        _draw_steps(left, points)
        _draw_efficiency(right, points)
        for axes in (left, right):
            axes.set_xticks(range(len(points)), [str(p.gpus) for p in points])
            axes.grid(alpha=0.25, linewidth=0.7, axis="y")
        figure.suptitle(f"{title}: PREDICTED by icrl plan, not measured")
    return path


def _draw_steps(axes: Any, points: list[Point]) -> None:
    from icrl_megatron.report.plots import COLOURS

    big, own = fitting(points, grown_batch=True), fitting(points, grown_batch=False)
    x, bottoms = [i for i, _ in big], [0.0] * len(big)
    for (label, names), colour in zip(GROUPS.items(), COLOURS, strict=False):
        heights = [sum(plan.times.phases[name] for name in names) for _, plan in big]
        axes.bar(x, heights, 0.62, bottom=bottoms, label=label, color=colour)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axes.plot([i for i, _ in own], [p.times.total for _, p in own], "k.--", linewidth=1.2, label="recipe's own batch")
    axes.set(ylabel="seconds a step (predicted)", xlabel="GPUs")
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def _draw_efficiency(axes: Any, points: list[Point]) -> None:
    from icrl_megatron.report.plots import COLOURS

    for grown_batch, style, colour in ((True, "o-", COLOURS[1]), (False, ".--", "black")):
        found = fitting(points, grown_batch)
        shares = [efficiency(points, plan) for _, plan in found]
        label = "batch grows with the GPUs" if grown_batch else "recipe's own batch"
        axes.plot([i for i, _ in found], shares, style, color=colour, linewidth=1.2, label=label)
    fewest = points[fitting(points, grown_batch=True)[0][0]].gpus
    axes.set(ylabel=f"tokens/s/GPU, share of {fewest} GPUs' (predicted)", xlabel="GPUs")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
