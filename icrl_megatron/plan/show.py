"""What `icrl plan` prints."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from icrl_megatron.plan.hardware import GIB
from icrl_megatron.plan.planner import Plan
from icrl_megatron.plan.scaling import Point, efficiency
from icrl_megatron.plan.search import SearchResult, overrides, why_slower

ROWS = 12


def layout_words(plan: Plan) -> str:
    layout = plan.layout
    apart = f" on {layout.engine_gpus} GPUs of their own" if layout.engine_gpus else ""
    words = (
        f"TP {layout.tensor} x PP {layout.pipeline} x CP {layout.context} x DP {layout.data}, engines of "
        f"{layout.engine_tensor}{apart}, {layout.micro_batch_tokens} tokens a micro-batch, recompute {layout.recompute}"
    )
    words += f", offload {layout.offload}" if layout.offload != "none" else ""
    return words + ("" if layout.serving.local else f", engine's share of a GPU {layout.memory_fraction:g}")


def show(plan: Plan, console: Console) -> None:
    """Memory and time of one plan."""
    console.print(f"{plan.layout.all_gpus} x {plan.gpu.name}: {layout_words(plan)}", soft_wrap=True)
    console.print("everything below is predicted (docs/PLANNER.md), nothing is measured")
    console.print(_memory(plan))
    console.print(_times(plan))
    work = plan.work
    console.print(
        f"{plan.tokens_a_second_a_gpu:.0f} tokens/s/GPU; training MFU {plan.training_mfu:.0%}; a step generates "
        f"{work.generated_tokens:,.0f} tokens and trains on {work.trained_tokens:,.0f} in {len(work.sequence_S)} "
        f"sequences; {plan.times.tail:.0%} of decoding waits for the slower half of the episodes",
        soft_wrap=True,
    )


def _memory(plan: Plan) -> Table:
    held = plan.memory
    table = Table("memory of the fullest GPU", "GiB", box=None, pad_edge=False)
    where = ", on engine ranks" if plan.layout.engine_gpus else ""
    parts = {
        "weights": held.state.weights,
        "gradients (fp32)": held.state.gradients,
        "optimizer (this replica's share)": held.state.optimizer,
        f"activations, recompute {plan.layout.recompute}": held.activations,
        "head": held.head,
        f"engine weights{where}": held.engine.weights,
        f"key-value cache{where}": held.engine.caches,
    }
    if held.state.fp8_copies:
        parts["FP8 copies of the layers' matrices"] = held.state.fp8_copies
    for name, size in parts.items():
        table.add_row(f"  {name}", f"{size / GIB:.2f}")
    for phase, size in held.phases.items():
        over = size > held.available
        table.add_row(f"peak in {phase}" + (" (does not fit)" if over else ""), f"{size / GIB:.2f}")
    table.add_row("available", f"{held.available / GIB:.2f}")
    return table


def _times(plan: Plan) -> Table:
    table = Table("time of a step", "s", "share", box=None, pad_edge=False)
    for name, seconds in plan.times.phases.items():
        table.add_row(f"  {name}", f"{seconds:.1f}", f"{seconds / plan.times.total:.0%}")
    table.add_row("step", f"{plan.times.total:.1f}", "")
    return table


def show_scaling(points: list[Point], console: Console) -> None:
    """Step time and efficiency over numbers of GPUs."""
    console.print("the batch grows with the GPUs from what the recipe has on its own number of them")
    table = Table(
        "GPUs", "step, own batch", "step, batch grows", "tokens/s/GPU", "efficiency", box=None, pad_edge=False
    )
    for point in points:
        own, grown = _seconds(point.same_batch, point.refusal), _seconds(point.grown_batch, point.grown_refusal)
        rate, share = "", ""
        if point.grown_batch is not None and point.grown_batch.fits:
            rate = f"{point.grown_batch.tokens_a_second_a_gpu:.0f}"
            share = f"{efficiency(points, point.grown_batch):.0%}"
        table.add_row(str(point.gpus), own, grown, rate, share)
    console.print(table)


def _seconds(plan: Plan | None, refusal: str) -> str:
    if plan is None:
        return f"not possible: {refusal}"
    missing = "" if plan.fits else f" (does not fit: {plan.memory.missing / GIB:.1f} GiB missing)"
    return f"{plan.times.total:.1f} s{missing}"


def show_search(found: SearchResult, console: Console) -> None:
    """The layouts that fit, fastest first, and the others by reason."""
    table = Table("step", "tokens/s/GPU", "peak GiB", "layout", "against the best", box=None, pad_edge=False)
    for plan in found.best[:ROWS]:
        peak = f"{plan.memory.peak[1] / GIB:.1f}"
        why = "" if plan is found.best[0] else why_slower(plan, found.best[0])
        table.add_row(f"{plan.times.total:.1f} s", f"{plan.tokens_a_second_a_gpu:.0f}", peak, layout_words(plan), why)
    console.print(table)
    fallen: dict[str, list[str]] = defaultdict(list)
    for plan in found.best[ROWS:]:
        layout = plan.layout
        sizes = f"{layout.tensor}x{layout.pipeline}x{layout.context}/{layout.engine_tensor}"
        fallen[f"fits, and is slower than the {ROWS} above"].append(sizes)
    for one in found.rejected:
        fallen[one.reason].append(f"{one.tensor}x{one.pipeline}x{one.context}/{one.engine_tensor}")
    reasons = Table("TPxPPxCP/engine TP", "why it fell", box=None, pad_edge=False)
    for reason, layouts in fallen.items():
        reasons.add_row(" ".join(layouts), reason)
    console.print(reasons)
    if found.best:
        console.print("the settings of the fastest, to paste after the recipe's name:")
        console.print(" ".join(overrides(found.best[0].layout)), soft_wrap=True)
