"""Bytes on the fullest GPU, by phase of a step. docs/PLANNER.md derives each line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from icrl_megatron.config import Settings
from icrl_megatron.plan.calibration import CONSTANTS, Constants
from icrl_megatron.plan.hardware import Gpu
from icrl_megatron.plan.layout import Layout, engine_parameters, kv_bytes_a_token, local_parameters
from icrl_megatron.shape import Qwen3Shape

HEAD_CHUNK_BYTES = 2_100_000_000
"""The most that the GPU head's buffer of logits takes when `actor.head_chunk_tokens` is left open."""

ROUNDING_BYTES = 2.0**20


@dataclass(frozen=True)
class State:
    """What the actor holds between passes, bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def moved(self, offload: str) -> float:
        """What is copied to the host's memory before episodes are played, and back afterwards."""
        return 0.0 if offload == "none" else self.optimizer

    def stays(self, offload: str) -> float:
        """What is on the GPU meanwhile. Gradients are dropped, not moved: every step begins with zeroes."""
        gradients = self.gradients if offload == "all" else 0.0
        return self.total - self.moved(offload) - gradients


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    state: State
    activations: float
    head: float
    engine_weights: float
    kv_cache: float
    phases: Mapping[str, float]
    """Peak of each phase and transition, reserve and fragmentation included."""
    available: float

    @property
    def peak(self) -> tuple[str, float]:
        name = max(self.phases, key=lambda phase: self.phases[phase])
        return name, self.phases[name]

    @property
    def missing(self) -> float:
        """Bytes by which the worst phase is over; 0 when everything fits (the cache fills what is left)."""
        over = self.peak[1] - self.available
        return over if over > ROUNDING_BYTES else 0.0


def state(shape: Qwen3Shape, layout: Layout) -> State:
    """Megatron's distributed optimizer: weights, an fp32 gradient buffer, and Adam's state cut over the replicas.

    In bf16 each replica's share has fp32 weights and two moments (12 bytes a parameter); in fp32 the weights are their
    own main copy (8).
    """
    local = local_parameters(shape, layout)
    of_optimizer = 12 if layout.precision == "bf16" else 8
    return State(local * layout.item, local * 4.0, local * of_optimizer / (layout.data * layout.context))


def layer_activations(shape: Qwen3Shape, layout: Layout, tokens: int, recompute: str) -> float:
    """Bytes that one layer keeps for its backward pass of a micro-batch of `tokens` (flash attention: nothing grows
    with the square of the length)."""
    item, sp, tp = layout.item, layout.sequence_share, 1 / (layout.tensor * layout.context)
    if recompute == "full":
        return tokens * shape.hidden * item * sp
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    kept = 4 * shape.hidden * sp  # inputs and outputs of both norms
    # q, k, v; q and k before their norms, and after the rotation; the attention's output
    kept += (query + 2 * key_value + 2 * (query + key_value) + query) * tp
    kept += 3 * shape.ffn * tp  # gate, up, and their product
    statistics = 4.0 * shape.heads * tp
    return tokens * (kept * item + (statistics if recompute == "none" else 0.0))


def activations(shape: Qwen3Shape, layout: Layout, tokens: int, micro_batches: int) -> float:
    """Bytes at the peak of a training pass. The first stage of a 1F1B pipeline holds as many micro-batches as there
    are stages; a layer that is recomputed needs all of its own once more, and its products gather their input."""
    layers = shape.layers // layout.pipeline
    in_flight = min(layout.pipeline, max(1, micro_batches))
    kept = in_flight * layers * layer_activations(shape, layout, tokens, layout.recompute)
    working = layer_activations(shape, layout, tokens, "none") if layout.recompute == "full" else 0.0
    gathered = 2 * tokens * shape.hidden * layout.item / layout.context if layout.sequence_parallel else 0.0
    ends = 2 * tokens * shape.hidden * layout.item * layout.sequence_share
    return kept + working + gathered + ends


def forward_only(shape: Qwen3Shape, layout: Layout, tokens: int) -> float:
    """Bytes of a pass without gradients: one layer's activations, and its input."""
    return layer_activations(shape, layout, tokens, "none") + 2 * tokens * shape.hidden * layout.item


def head(shape: Qwen3Shape, layout: Layout, settings: Settings, tokens: int) -> float:
    """Bytes of the chunked head for at most `tokens` loss tokens: a buffer of logits, hidden states and gradients."""
    columns = shape.padded_vocab(layout.tensor) // layout.tensor
    stored = 2 if settings.actor.head_logits == "bf16" else 4
    chunk = settings.actor.head_chunk_tokens
    buffer = min(float(HEAD_CHUNK_BYTES), float(tokens) * columns * stored)
    if chunk is not None:
        buffer = float(min(chunk, tokens)) * columns * stored
    return buffer + 3.0 * tokens / layout.context * shape.hidden * layout.item


def estimate(
    shape: Qwen3Shape,
    layout: Layout,
    settings: Settings,
    gpu: Gpu,
    micro_batches: int,
    constants: Constants = CONSTANTS,
) -> Memory:
    """Memory of a step on this layout; the longest sequence may exceed the token budget and then rules."""
    tokens = max(layout.micro_batch_tokens, settings.rollout.context_tokens)
    held, local_engine = state(shape, layout), settings.engine.kind == "local"
    reference = held.weights if settings.algo.kl_coef > 0 else 0.0
    resident, beside = held.total + reference, held.stays(layout.offload) + reference
    engines = 2 if settings.rollout.critic == "frozen" else 1
    engine = engines * float(engine_parameters(shape, layout.engine_tensor) * layout.item)
    of_head = head(shape, layout, settings, tokens)
    trained = activations(shape, layout, tokens, micro_batches)
    usable = (gpu.memory_bytes - constants.reserved_bytes) / (1 + constants.fragmentation)
    workspace = 0.0 if local_engine else constants.engine_workspace_bytes
    # Never more than asked for; never less than one whole context, or no episode could be played.
    token = kv_bytes_a_token(shape, layout.engine_tensor, layout.item)
    asked = settings.engine.memory_fraction * gpu.memory_bytes - engine
    if settings.engine.kv_tokens is not None:
        asked = min(asked, settings.engine.kv_tokens * token)
    room = usable - beside - engine - workspace
    cache = max(settings.rollout.context_tokens * token, min(asked, room))
    asleep = engine if local_engine else constants.engine_asleep_bytes
    phases = {
        "rollout": beside + engine + workspace + cache,
        "score": resident + asleep + forward_only(shape, layout, tokens) + of_head,
        "train": resident + asleep + trained + of_head,
        "sync (train to rollout)": beside + engine + 2 * constants.sync_bucket_bytes,
    }
    total = {k: v * (1 + constants.fragmentation) + constants.reserved_bytes for k, v in phases.items()}
    return Memory(held, trained, of_head, engine, cache, total, gpu.memory_bytes)
