"""How a plan scales over numbers of GPUs, and the picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from icrl_megatron.config import Settings
from icrl_megatron.plan.hardware import Gpu
from icrl_megatron.plan.layout import Layout
from icrl_megatron.plan.models import shape_of
from icrl_megatron.plan.planner import Plan, grown, of_layout

GPU_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
GROUPS = {
    "rollout": ("prefill", "decode", "environments"),
    "scoring": ("scoring",),
    "training": ("training", "optimizer"),
    "collectives, bubbles": ("tensor collectives", "data collectives", "bubbles"),
    "sync, other": ("sync", "offload", "other"),
}


@dataclass(frozen=True)
class Point:
    """One number of GPUs, with the recipe's own batch, and with one that grows with the GPUs."""

    gpus: int
    same_batch: Plan | None
    """None where there are more replicas than episodes."""
    grown_batch: Plan


def scale(settings: Settings, gpu: Gpu) -> list[Point]:
    """Plans for 8 to 1024 GPUs; the grown batch has the tasks of the recipe for every 8 GPUs."""
    shape, points = shape_of(settings), []
    for gpus in GPU_COUNTS:
        layout, bigger = Layout.of(settings, gpus), grown(settings, gpus / GPU_COUNTS[0])
        small = settings.rollout.tasks_per_step * settings.rollout.episodes_per_task
        large = bigger.rollout.tasks_per_step * bigger.rollout.episodes_per_task
        fits = layout.refusal(shape, small) is None
        layout.checked(shape, large)
        same = of_layout(settings, shape, layout, gpu) if fits else None
        points.append(Point(gpus, same, of_layout(bigger, shape, layout, gpu)))
    return points


def efficiency(points: list[Point]) -> list[float]:
    """Tokens a second and GPU of the grown batch, as a share of that on 8 GPUs."""
    first = points[0].grown_batch.tokens_a_second_a_gpu
    return [point.grown_batch.tokens_a_second_a_gpu / first for point in points]


def picture(points: list[Point], path: Path, title: str) -> Path:
    """Step time by phase and efficiency over the number of GPUs, as a PNG that says that it is predicted."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from icrl_megatron.telemetry.plots import COLOURS

    with mpl.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        x, bottoms = list(range(len(points))), [0.0] * len(points)
        for (label, names), colour in zip(GROUPS.items(), COLOURS, strict=False):
            heights = [sum(p.grown_batch.times.phases[name] for name in names) for p in points]
            left.bar(x, heights, 0.62, bottom=bottoms, label=label, color=colour)
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        same = [(i, p.same_batch.times.total) for i, p in enumerate(points) if p.same_batch is not None]
        left.plot(*zip(*same, strict=True), "k.--", linewidth=1.2, label="recipe's own batch")
        left.set(ylabel="seconds a step (predicted)", xlabel="GPUs")
        left.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        right.plot(x, efficiency(points), "o-", color=COLOURS[1], label="batch grows with the GPUs")
        first = points[0].grown_batch.tokens_a_second_a_gpu
        shares = [(i, p.same_batch.tokens_a_second_a_gpu / first) for i, p in enumerate(points) if p.same_batch]
        right.plot(*zip(*shares, strict=True), "k.--", linewidth=1.2, label="recipe's own batch")
        right.set(ylabel="tokens/s/GPU, share of 8 GPUs' (predicted)", xlabel="GPUs", ylim=(0, 1.08))
        right.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        for axes in (left, right):
            axes.set_xticks(x, [str(p.gpus) for p in points])
            axes.grid(alpha=0.25, linewidth=0.7, axis="y")
        figure.suptitle(f"{title}: PREDICTED by icrl plan, not measured")
        figure.savefig(path, dpi=140)
    return path
