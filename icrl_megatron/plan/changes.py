"""What might be changed where a plan does not fit: layouts one or two settings away, and the words that make them."""

from __future__ import annotations

from collections.abc import Iterator

from icrl_megatron.plan.layout import Layout

MOST_GPUS = 8
"""Up to this many times the GPUs are looked at."""
KINDS = (
    "actor.recompute, actor.offload, actor.micro_batch_tokens, actor.tensor_parallel, actor.pipeline_parallel, "
    "actor.context_parallel, engine.tensor_parallel and engine.memory_fraction"
)
"""What the changes below are of."""
_FRACTION_STEP = 0.1


def changes(layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Single changes, then pairs of them, then more GPUs with each. No layout comes twice."""
    seen = {layout}
    for words, changed in _all(layout):
        if changed not in seen:
            seen.add(changed)
            yield words, changed


def _all(layout: Layout) -> Iterator[tuple[str, Layout]]:
    yield from _upto_two(layout)
    factor = 2
    while factor <= MOST_GPUS:
        more = layout.but(gpus=layout.gpus * factor)
        words = f"{more.all_gpus} GPUs"
        yield words, more
        yield from ((f"{words} with {what}", changed) for what, changed in _upto_two(more))
        factor *= 2


def _upto_two(layout: Layout) -> Iterator[tuple[str, Layout]]:
    singles = list(_single(layout))
    yield from singles
    for name, once in singles:
        setting = name.partition("=")[0]
        yield from ((f"{name} {more}", twice) for more, twice in _single(once) if not more.startswith(setting))


def _single(layout: Layout) -> Iterator[tuple[str, Layout]]:
    modes = ("none", "selective", "full")
    for mode in modes[modes.index(layout.recompute) + 1 :]:
        yield f"actor.recompute={mode}", layout.but(recompute=mode)
    kinds = ("none", "optimizer", "all")
    for kind in kinds[kinds.index(layout.offload) + 1 :]:
        yield f"actor.offload={kind}", layout.but(offload=kind)
    for part in (2, 4):
        tokens = layout.micro_batch_tokens // part
        if tokens >= 1024:
            yield f"actor.micro_batch_tokens={tokens}", layout.but(micro_batch_tokens=tokens)
    if not (layout.serving.local or layout.serving.remote):  # neither takes a share of our GPUs
        fraction = round(layout.memory_fraction - _FRACTION_STEP, 2)
        while fraction >= _FRACTION_STEP:
            yield f"engine.memory_fraction={fraction:g}", layout.but(memory_fraction=fraction)
            fraction = round(fraction - _FRACTION_STEP, 2)
    for size in (2, 4, 8):
        if size > layout.engine_tensor and layout.serving.tensor_parallel:
            yield f"engine.tensor_parallel={size}", layout.but(engine_tensor=size)
        if size > layout.tensor:
            words = f"actor.tensor_parallel={size}"
            words += "" if layout.sequence_parallel else " actor.sequence_parallel=true"
            yield words, layout.but(tensor=size, sequence_parallel=True)
        if size > layout.pipeline:
            yield f"actor.pipeline_parallel={size}", layout.but(pipeline=size)
        if size > layout.context:
            yield f"actor.context_parallel={size}", layout.but(context=size)
