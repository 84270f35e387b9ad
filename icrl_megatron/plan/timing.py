"""Seconds of a step, by phase. docs/PLANNER.md has the formulas and their sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from icrl_megatron.data.balance import assign, imbalance
from icrl_megatron.model.flops import Forward, Passes, SampleFlops, counts, layer_passes
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.plan import pipeline
from icrl_megatron.plan.calibration import CONSTANTS, Constants
from icrl_megatron.plan.engine_speed import decode_speed, prefill_token_s
from icrl_megatron.plan.hardware import Gpu
from icrl_megatron.plan.layout import Layout, engine_bytes, kv_bytes_a_token, local_parameters
from icrl_megatron.plan.workload import Floats, Workload

FP32_FLOPS = 60e12
"""Per second and GPU, without tensor cores: data sheets say 19.5 to 80 TFLOP/s, and nothing is planned around it."""
SEGMENTS = 48
"""Pieces that the decreasing number of running episodes is cut into."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step; `phases` add up to `total`."""

    phases: Mapping[str, float]
    model_flops: float
    """FLOPs of training without recomputation, which MFU counts."""
    tail: float
    """Share of the rollout during which fewer than half of the episodes still ran."""

    @property
    def total(self) -> float:
        return sum(self.phases.values())

    @property
    def update(self) -> float:
        """Seconds of training alone: passes, their collectives, and the optimizer."""
        parts = ("training", "tensor collectives", "context exchange", "bubbles", "data collectives", "optimizer")
        return sum(self.phases[part] for part in parts)


@dataclass(frozen=True)
class Rollout:
    """Seconds of the rollout phase on the engine that ends last."""

    prefill: float
    decode: float
    waiting: float
    """For environments without tools, beyond decoding."""
    calling: float
    """For tool calls, beyond decoding and environments."""
    tail: float


def forward_flops(shape: ModelShape, work: Workload, everywhere: bool = False) -> tuple[float, float]:
    """FLOPs of one forward pass over the step's sequences: layers, and the head over its loss tokens."""
    forward = Forward.of(shape)
    tokens = work.trained_tokens if everywhere else float(work.loss_S.sum())
    return forward.token * work.trained_tokens + _attention_flops(shape, work), float(forward.loss_token) * tokens


def _attention_flops(shape: ModelShape, work: Workload) -> float:
    """FLOPs of attention alone, without the projections."""
    return Forward.of(shape).square * float((work.sequence_S**2).sum())


def estimate(
    shape: ModelShape,
    layout: Layout,
    work: Workload,
    passes: Passes,
    gpu: Gpu,
    cache_bytes: float,
    constants: Constants = CONSTANTS,
    moved_bytes: float = 0.0,
) -> Times:
    """`cache_bytes`: the key-value cache on each GPU of an engine; `moved_bytes`: what each GPU hands to the host's
    memory before episodes are played, and takes back."""
    layers, head = forward_flops(shape, work, passes.head_everywhere)
    rate = constants.training_efficiency * layout.gpus * (gpu.bf16_flops if layout.precision == "bf16" else FP32_FLOPS)
    layer_rate = rate * (constants.fp8_gain if layout.fp8 != "off" else 1.0)
    recomputed = float(layout.recompute == "full")
    matrices_passes, attention_passes = layer_passes(layout.recompute)
    attention = _attention_flops(shape, work)
    # The last stage has the head besides its layers, and every other stage waits for it.
    of_head = head * layout.pipeline / rate
    tokens_M = pipeline.packed(work.sequence_S, layout.data, passes.updates, layout.micro_batch_tokens)
    launches = passes.updates * len(tokens_M) * shape.layers / layout.pipeline * constants.layer_launch_s
    trained = (matrices_passes * (layers - attention) + attention_passes * attention) / layer_rate
    trained += passes.head_products * of_head
    trained = max(trained, (2.0 + recomputed) * launches)
    scored = passes.scored * max(layers / layer_rate + of_head, launches)
    bubbles = trained * pipeline.waiting_1f1b(tokens_M, layout.pipeline)
    bubbles += scored * pipeline.waiting_forward(tokens_M, layout.pipeline)
    # A replica that has less than one micro-batch of work is not faster for it, nor is one with an uneven share.
    uneven = _imbalance(shape, layout, work, passes)
    forward_moves, backward_moves = _tensor_traffic(shape, layout, work, gpu, constants)
    exchange = _context_exchange(shape, layout, work, gpu, constants)
    rollout = play(shape, layout, work, gpu, cache_bytes, constants)
    optimizer = passes.updates * constants.optimizer_bytes * local_parameters(shape, layout)
    optimizer = optimizer / (layout.data * layout.context) / gpu.memory_bandwidth
    phases = {
        "prefill": rollout.prefill,
        "decode": rollout.decode,
        "environments": rollout.waiting,
        "tools": rollout.calling,
        "scoring": scored * uneven + passes.scored * (forward_moves + exchange),
        "training": trained * uneven,
        "tensor collectives": forward_moves * (1 + recomputed) + backward_moves,
        "context exchange": attention_passes * exchange,
        "bubbles": bubbles * uneven,
        "data collectives": passes.updates * _reduction(shape, layout, gpu, constants),
        "optimizer": optimizer,
        "sync": sync(shape, layout, gpu, constants),
        "offload": 2.0 * moved_bytes / (gpu.host_bandwidth * constants.link_efficiency),
        "host": constants.host_sample_s * len(work.sequence_S),
        "other": constants.step_fixed_s,
    }
    return Times(phases, 3.0 * (layers + head), rollout.tail)


def _imbalance(shape: ModelShape, layout: Layout, work: Workload, passes: Passes) -> float:
    """FLOPs of the heaviest replica over the mean in one update, as `data.balance` distributes the samples."""
    if layout.data == 1:
        return 1.0
    flops = SampleFlops.of_passes(shape, passes, layout.recompute, layout.pipeline)
    loss_tokens_S = work.sequence_S if passes.head_everywhere else work.loss_S
    columns = (column[:: passes.updates] for column in (work.sequence_S, loss_tokens_S))
    tokens_S, loss_S = (np.rint(column).astype(np.int64) for column in columns)
    flops_S = flops.each(tokens_S, tokens_S, loss_S)
    return imbalance(flops_S, assign(flops_S, layout.data), layout.data)


def _tensor_traffic(
    shape: ModelShape, layout: Layout, work: Workload, gpu: Gpu, constants: Constants
) -> tuple[float, float]:
    """Seconds of the all-gathers and reduce-scatters of one forward and one backward pass over the step.

    Two of each a layer and direction (the backward pass gathers the inputs of its products once more), each moving
    (t - 1) / t of the tokens' hidden states through every GPU; none of it is assumed to hide behind computation.
    """
    share = (layout.tensor - 1) / layout.tensor
    bandwidth = gpu.nvlink_bandwidth * constants.link_efficiency
    tokens = work.trained_tokens / layout.data / layout.context
    once = tokens * shape.hidden * layout.item * share / bandwidth * shape.layers / layout.pipeline
    return 4.0 * once, 6.0 * once


def _context_exchange(shape: ModelShape, layout: Layout, work: Workload, gpu: Gpu, constants: Constants) -> float:
    """Seconds in which keys and values go around the context-parallel ranks in a forward pass over the step: each layer
    moves (c - 1) / c of them through every GPU. In the backward pass their gradients go around with them. Transformer
    Engine hides this behind attention where that takes longer; here none of it is assumed to be hidden."""
    if layout.context == 1:
        return 0.0
    far = layout.spans_nodes(layout.tensor * layout.context)
    bandwidth = (gpu.network_bandwidth if far else gpu.nvlink_bandwidth) * constants.link_efficiency
    share = (layout.context - 1) / layout.context
    key_value = 2 * shape.kv_heads * shape.head_dim / layout.tensor * layout.item
    return work.trained_tokens / layout.data * key_value * share / bandwidth * shape.layers / layout.pipeline


def _reduction(shape: ModelShape, layout: Layout, gpu: Gpu, constants: Constants) -> float:
    """Seconds to reduce-scatter fp32 gradients and all-gather weights over the replicas, once an update."""
    ranks = layout.data * layout.context
    if ranks == 1:
        return 0.0
    local = local_parameters(shape, layout)
    far = layout.spans_nodes(layout.gpus)
    bandwidth = (gpu.network_bandwidth if far else gpu.nvlink_bandwidth) * constants.link_efficiency
    moved = local * (4.0 + layout.item) * (ranks - 1) / ranks
    buckets = max(1, math.ceil(local / max(constants.bucket_parameters, 1_000_000 * ranks)))
    return moved / bandwidth + buckets * 2 * (ranks - 1) * constants.hop_latency_s


def sync(shape: ModelShape, layout: Layout, gpu: Gpu, constants: Constants = CONSTANTS) -> float:
    """Seconds until the engines have new weights: gathered over TP, sent over PP, copied into each engine."""
    whole = counts(shape).total * float(layout.item)
    link = gpu.nvlink_bandwidth * constants.link_efficiency
    gathered = whole * (layout.tensor - 1) / layout.tensor / link
    far = layout.spans_nodes(layout.cell)
    link = (gpu.network_bandwidth if far else gpu.nvlink_bandwidth) * constants.link_efficiency
    sent = whole * (layout.pipeline - 1) / layout.pipeline / link
    copied = 2.0 * engine_bytes(shape, layout) / gpu.memory_bandwidth
    return gathered + sent + copied + constants.sync_fixed_s


def play(
    shape: ModelShape, layout: Layout, work: Workload, gpu: Gpu, cache_bytes: float, constants: Constants = CONSTANTS
) -> Rollout:
    """The rollout on the engine that ends last. Whole tasks are dealt to the engines in turn, as the loop does it."""
    tasks = len(work.generated_E) // work.episodes_a_task
    shape_TE = (tasks, work.episodes_a_task)
    slowest: Rollout | None = None
    whole = (work.generated_E, work.context_E, work.read_E, work.waiting_E, work.calling_E, work.queued_E)
    columns = [column.reshape(shape_TE) for column in whole]
    for engine in range(min(layout.engines, tasks)):
        share = [column[engine :: layout.engines].ravel() for column in columns]
        ended = _engine(shape, layout, share, gpu, cache_bytes, constants)
        if slowest is None or _seconds(ended) > _seconds(slowest):
            slowest = ended
    assert slowest is not None
    return slowest


def _seconds(rollout: Rollout) -> float:
    return rollout.prefill + rollout.decode + rollout.waiting + rollout.calling


def _engine(
    shape: ModelShape, layout: Layout, share: list[Floats], gpu: Gpu, cache_bytes: float, constants: Constants
) -> Rollout:
    """`share`: generated, context, read, waiting, calling and queued of the engine's episodes, as in `Workload`.

    An episode ends when its tokens would be decoded if nothing waited, plus its own waiting and calls. Decoding does
    not get faster meanwhile, so this is an upper bound where calls are long.
    """
    speed = decode_speed(shape, layout, gpu, constants)
    prefill = prefill_token_s(shape, layout, gpu, constants) * float(share[2].sum())
    capacity = cache_bytes / kv_bytes_a_token(shape, layout.engine_tensor, layout.item)
    order = np.argsort(share[0])
    lengths, contexts, _, waiting, calling, queued = (column[order] for column in share)
    edges = np.unique(np.linspace(0, len(lengths), SEGMENTS + 1).astype(int))
    seconds, done, half, environments_end, end = 0.0, 0.0, 0.0, 0.0, float(queued.sum())
    for low, high in pairwise(edges.tolist()):
        until = float(lengths[low:high].mean()) if high < len(lengths) else float(lengths[-1])
        iterations, done = max(0.0, until - done), max(done, until)
        running = len(lengths) - (int(low) + int(high)) / 2 if high < len(lengths) else (high - low + 1) / 2
        cached = running * float(contexts[low:].mean())
        # Those that do not fit the cache, or are more than may run, wait for their turn.
        crowded = max(1.0, cached / capacity, running / layout.serving.most_running)
        step = speed.step(running / crowded, cached / crowded)
        seconds += iterations * step * crowded
        half += iterations * step * crowded if running < len(lengths) / 2 else 0.0
        environments_end = max(environments_end, seconds + float(waiting[low:high].max()))
        end = max(end, seconds + float((waiting + calling)[low:high].max()))
    tail = half / max(seconds, 1e-9)
    return Rollout(prefill, float(seconds), environments_end - seconds, end - environments_end, tail)
