"""Bytes on the fullest GPU, by phase of a step. docs/PLANNER.md derives each line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from icrl_megatron.model.flops import counts
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.plan.calibration import CONSTANTS
from icrl_megatron.plan.hardware import Gpu
from icrl_megatron.plan.layout import Layout, engine_bytes, kv_bytes_a_token, local_parameters
from icrl_megatron.settings.schema import Settings

HEAD_CHUNK_BYTES = 2_100_000_000
"""The most that the GPU head's buffer of logits takes when `actor.head_chunk_tokens` is left open."""

FP8_COPIES = 2.0
"""Bytes a parameter of the layers' matrices with actor.fp8: Transformer Engine keeps them row-wise and transposed."""

MOST_FRACTION = 0.95
"""Largest share of a GPU that a remedy proposes for the engine."""

ROUNDING_BYTES = 2.0**20


@dataclass(frozen=True)
class StateMemory:
    """What the actor holds between passes, bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    fp8_copies: float = 0.0
    """Copies of the layers' matrices, kept by Transformer Engine beside the bf16 weights."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.fp8_copies

    def moved(self, offload: str) -> float:
        """What is copied to the host's memory before episodes are played, and back afterwards."""
        return 0.0 if offload == "none" else self.optimizer

    def stays(self, offload: str) -> float:
        """What is on the GPU meanwhile. Gradients are dropped, not moved: every step begins with zeroes."""
        gradients = self.gradients if offload == "all" else 0.0
        return self.total - self.moved(offload) - gradients


@dataclass(frozen=True)
class EngineBytes:
    """What the engines take of one GPU while episodes are played, bytes."""

    weights: float
    """Weights of all engines that share the GPU."""
    cache: float
    """Cache of one engine: where there are two, the solver's."""
    caches: float
    """Caches of all engines that share the GPU."""
    refusal: str = ""
    """Why the cache does not hold one whole context, and the smallest setting that would; empty where it does."""

    @property
    def total(self) -> float:
        return self.weights + self.caches


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    state: StateMemory
    activations: float
    head: float
    engine: EngineBytes
    phases: Mapping[str, float]
    """Peak of each phase and transition, reserve and fragmentation included. With `launch.engine_ranks`, "rollout on
    engine ranks" is that of a GPU that only serves, and the others are those of a GPU that only trains."""
    available: float

    @property
    def peak(self) -> tuple[str, float]:
        name = max(self.phases, key=lambda phase: self.phases[phase])
        return name, self.phases[name]

    @property
    def fits(self) -> bool:
        return self.missing == 0.0 and not self.engine.refusal

    @property
    def missing(self) -> float:
        """Bytes by which the worst phase is over; 0 when everything fits."""
        over = self.peak[1] - self.available
        return over if over > ROUNDING_BYTES else 0.0


def state(shape: ModelShape, layout: Layout) -> StateMemory:
    """Megatron's distributed optimizer: weights, an fp32 gradient buffer, and Adam's state cut over the replicas.

    In bf16 each replica's share has fp32 weights and two moments (12 bytes a parameter); in fp32 the weights are their
    own main copy (8). With FP8 Megatron tells each micro-batch whether it is an update's first, and Transformer Engine
    then keeps its quantised weights for the others (`_fp8_workspaces`), over updates and rollouts.
    """
    local = local_parameters(shape, layout)
    of_optimizer = 12 if layout.precision == "bf16" else 8
    linear = shape.layers // layout.pipeline * counts(shape).linear / layout.tensor
    return StateMemory(
        local * layout.item,
        local * 4.0,
        local * of_optimizer / (layout.data * layout.context),
        linear * FP8_COPIES if layout.fp8 != "off" else 0.0,
    )


def layer_activations(shape: ModelShape, layout: Layout, tokens: int, recompute: str) -> float:
    """Bytes that one layer keeps for its backward pass of a micro-batch of `tokens` (flash attention: nothing grows
    with the square of the length)."""
    item, sp, tp = layout.item, layout.sequence_share, 1 / (layout.tensor * layout.context)
    if recompute == "full":
        return tokens * shape.hidden * item * sp
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = 4 * shape.hidden * sp  # inputs and outputs of both norms
    # q, k, v; q and k after their norms, if they have any, and after the rotation; the attention's output
    kept += (query + 2 * key_value + (1 + shape.family.qk_norm) * (query + key_value) + query) * tp
    kept += 3 * shape.ffn * tp  # gate, up, and their product
    statistics = 4.0 * shape.heads * tp
    return tokens * (kept * item + (statistics if recompute == "none" else 0.0))


def activations(shape: ModelShape, layout: Layout, tokens: int, micro_batches: int) -> float:
    """Bytes at the peak of a training pass. The first stage of a 1F1B pipeline holds as many micro-batches as there
    are stages; a layer that is recomputed needs all of its own once more, and its products gather their input."""
    layers = shape.layers // layout.pipeline
    in_flight = min(layout.pipeline, max(1, micro_batches))
    kept = in_flight * layers * layer_activations(shape, layout, tokens, layout.recompute)
    working = layer_activations(shape, layout, tokens, "none") if layout.recompute == "full" else 0.0
    gathered = 2 * tokens * shape.hidden * layout.item / layout.context if layout.sequence_parallel else 0.0
    ends = 2 * tokens * shape.hidden * layout.item * layout.sequence_share
    # Gradients of keys and values go around with them.
    return kept + working + gathered + ends + 2 * exchanged(shape, layout, tokens)


def exchanged(shape: ModelShape, layout: Layout, tokens: int) -> float:
    """Bytes of one layer's keys and values of all context-parallel ranks, which each of them receives in turn and which
    Transformer Engine keeps until the layer's attention has ended."""
    if layout.context == 1:
        return 0.0
    return 2.0 * tokens * shape.kv_heads * shape.head_dim / layout.tensor * layout.item


def forward_only(shape: ModelShape, layout: Layout, tokens: int) -> float:
    """Bytes of a pass without gradients: one layer's activations, and its input."""
    ends = 2 * tokens * shape.hidden * layout.item / layout.context
    return layer_activations(shape, layout, tokens, "none") + ends + exchanged(shape, layout, tokens)


def head(shape: ModelShape, layout: Layout, settings: Settings, tokens: int) -> float:
    """Bytes of the chunked head for at most `tokens` loss tokens of a micro-batch, a context-parallel rank's share of
    them: a buffer of logits, hidden states and gradients."""
    own = math.ceil(tokens / layout.context)
    columns = shape.padded_vocab(layout.tensor) // layout.tensor
    stored = 2 if settings.actor.head_logits == "bf16" else 4
    chunk = settings.actor.head_chunk_tokens
    buffer = min(float(HEAD_CHUNK_BYTES), float(own) * columns * stored)
    if chunk is not None:
        buffer = float(min(chunk, own)) * columns * stored
    return buffer + 3.0 * own * shape.hidden * layout.item


def engine(shape: ModelShape, layout: Layout, settings: Settings, gpu: Gpu, left: float) -> EngineBytes:
    """What the engines take; `left` is what the rest leaves free, which only a local engine looks at.

    A server takes memory_fraction of the GPU for weights and cache together, whatever lies beside it: it is started on
    an empty GPU, sizes its cache there, and takes exactly that back at every wake. engine.kv_tokens may lower it.
    """
    of_weights, engines = engine_bytes(shape, layout), layout.serving.on_a_gpu
    token = kv_bytes_a_token(shape, layout.engine_tensor, layout.item)
    spare = layout.serving.spare_tokens
    least = (settings.rollout.context_tokens + spare) * token
    if layout.serving.local:  # its cache grows with what it decodes
        cache = max(least, left / engines - of_weights)
        return EngineBytes(engines * of_weights, cache, engines * cache)
    share = layout.memory_fraction / engines * gpu.memory_bytes - of_weights
    cache = max(least, min(share, ((settings.engine.kv_tokens or math.inf) + spare) * token))
    if layout.serving.remote:  # on its owner's GPUs, which are taken to be like ours
        return EngineBytes(0.0, cache, 0.0)
    smallest = (of_weights + least) * engines / gpu.memory_bytes
    return EngineBytes(engines * of_weights, cache, engines * cache, _too_small(layout, settings, smallest))


def _too_small(layout: Layout, settings: Settings, smallest: float) -> str:
    """Why the engine's cache does not hold one whole context, or nothing; `smallest` is the fraction that would."""
    context, kv_tokens = settings.rollout.context_tokens, settings.engine.kv_tokens
    if layout.memory_fraction < smallest:
        most = math.ceil(smallest * 100) / 100
        would = f"{most:g} is the smallest that would" if most <= MOST_FRACTION else "nor would any other"
        return (
            f"engine.memory_fraction={layout.memory_fraction:g} of a GPU does not hold the engine's weights and one "
            f"context of rollout.context_tokens={context}"
            + (" for solver and frozen critic" if layout.serving.on_a_gpu > 1 else "")
            + f"; {would}, or raise engine.tensor_parallel"
        )
    if kv_tokens is not None and kv_tokens < context:
        return f"engine.kv_tokens={kv_tokens} does not hold rollout.context_tokens={context}; give at least {context}"
    return ""


def estimate(shape: ModelShape, layout: Layout, settings: Settings, gpu: Gpu, micro_batches: int) -> Memory:
    """Memory of a step on this layout; the longest sequence may exceed the token budget and then rules."""
    tokens = max(layout.micro_batch_tokens, settings.rollout.context_tokens)
    held, serving = state(shape, layout), layout.serving
    reference = held.weights + held.fp8_copies if settings.algo.kl_coef > 0 else 0.0
    resident, beside = held.total + reference, held.stays(layout.offload) + reference
    of_head = head(shape, layout, settings, tokens)
    trained = activations(shape, layout, tokens, micro_batches)
    loss = 1 + CONSTANTS.fragmentation
    engines = engine(shape, layout, settings, gpu, (gpu.memory_bytes - CONSTANTS.reserved_bytes) / loss - beside)
    # A local engine sleeps in host memory, and other engines may have GPUs of their own.
    apart = serving.remote or serving.own_ranks > 0
    servers = 0 if serving.local or apart else serving.on_a_gpu
    asleep = servers * CONSTANTS.engine_asleep_bytes
    # A server's share is measured by what the driver has free, so what is lost between its blocks is inside of it.
    own, served = (engines.total, 0.0) if serving.local else (0.0, 0.0 if apart else engines.total)
    pushed = engines.weights if servers else 0.0
    phases = {
        "rollout": (beside + servers * CONSTANTS.engine_workspace_bytes + own) * loss + served,
        "score": (resident + asleep + forward_only(shape, layout, tokens) + of_head) * loss,
        "train": (resident + asleep + trained + of_head) * loss,
        "sync (train to rollout)": (beside + pushed + 2 * CONSTANTS.sync_bucket_bytes) * loss,
    }
    if serving.own_ranks:
        phases["rollout on engine ranks"] = CONSTANTS.engine_workspace_bytes * loss + engines.total
    total = {name: size + CONSTANTS.reserved_bytes for name, size in phases.items()}
    return Memory(held, trained, of_head, engines, total, gpu.memory_bytes)
