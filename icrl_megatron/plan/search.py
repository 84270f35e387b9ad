"""The best layout for a number of GPUs, and why each of the others fell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from icrl_megatron.plan.hardware import GIB, Gpu
from icrl_megatron.plan.layout import Layout
from icrl_megatron.plan.models import shape_of
from icrl_megatron.plan.planner import Plan, episodes, memory_of, timed
from icrl_megatron.settings.schema import Settings

SIZES = (1, 2, 4, 8)
"""Sizes of TP, CP and engine TP that are tried."""
MOST_STAGES = 16
"""Every PP up to this is tried that divides the layers."""
MICRO_BATCHES = (8192, 16384, 32768)
MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class Rejected:
    """A combination of TP, PP, CP and engine TP none of whose micro-batches and recompute modes won or fitted."""

    tensor: int
    pipeline: int
    context: int
    engine_tensor: int
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """`best` has the fastest plan of each combination that fits, fastest first; may be empty."""

    best: tuple[Plan, ...]
    rejected: tuple[Rejected, ...]


def search(settings: Settings, gpus: int, gpu: Gpu) -> SearchResult:
    """Tries TP x PP x CP x engine TP, each with every micro-batch budget and recompute mode; DP is what remains.
    Offloading and the engine's share of a GPU stay what the settings say."""
    shape = shape_of(settings)
    best: list[Plan] = []
    rejected: list[Rejected] = []
    base = Layout.of(settings, gpus)
    engines = SIZES if base.serving.tensor_parallel else (1,)
    stages = [size for size in range(1, MOST_STAGES + 1) if shape.layers % size == 0]
    for tensor, pipeline, context, engine in product(SIZES, stages, SIZES, engines):
        sizes = {"tensor": tensor, "pipeline": pipeline, "context": context, "engine_tensor": engine}
        layout = base.but(**sizes, sequence_parallel=tensor > 1)
        reason = layout.refusal(shape, episodes(settings))
        if reason is None:
            held = [(one, memory_of(settings, shape, one, gpu)) for one in _variants(layout, settings)]
            fitting = [timed(settings, shape, one, gpu, memory) for one, memory in held if memory.fits]
            if fitting:
                best.append(min(fitting, key=lambda plan: plan.times.total))
                continue
            least = min((memory for _, memory in held), key=lambda memory: memory.missing)
            reason = least.engine.refusal or f"{least.peak[0]}: {least.missing / GIB:.1f} GiB missing"
        rejected.append(Rejected(tensor, pipeline, context, engine, reason))
    best.sort(key=lambda plan: plan.times.total)
    return SearchResult(tuple(best), tuple(rejected))


def _variants(layout: Layout, settings: Settings) -> Iterator[Layout]:
    budgets = [b for b in MICRO_BATCHES if b >= settings.rollout.context_tokens] or [settings.rollout.context_tokens]
    for tokens, mode in product(budgets, MODES):
        yield layout.but(micro_batch_tokens=tokens, recompute=mode)


def overrides(layout: Layout) -> tuple[str, ...]:
    """The settings that make a layout, as a recipe's overrides."""
    on_node = min(layout.gpus, layout.node)
    found = {
        "launch.ranks": on_node + layout.serving.own_ranks,
        "launch.nodes": layout.gpus // on_node,
        "actor.tensor_parallel": layout.tensor,
        "actor.pipeline_parallel": layout.pipeline,
        "actor.context_parallel": layout.context,
        "actor.sequence_parallel": str(layout.sequence_parallel).lower(),
        "actor.micro_batch_tokens": layout.micro_batch_tokens,
        "actor.recompute": layout.recompute,
    }
    if layout.serving.own_ranks:
        found["launch.engine_ranks"] = layout.serving.own_ranks
    if layout.serving.tensor_parallel:
        found["engine.tensor_parallel"] = layout.engine_tensor
    return tuple(f"{name}={value}" for name, value in found.items())


def why_slower(plan: Plan, best: Plan) -> str:
    """The phase in which a plan that fits loses most against the best one."""
    lost = {name: seconds - best.times.phases[name] for name, seconds in plan.times.phases.items()}
    worst = max(lost, key=lambda name: lost[name])
    return f"{plan.times.total / best.times.total:.2f}x the step, most of it {worst} (+{lost[worst]:.1f} s)"
