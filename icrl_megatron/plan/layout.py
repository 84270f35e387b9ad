"""How the GPUs are shared out, and what of the model lies on one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from icrl_megatron.config import ConfigError, Settings
from icrl_megatron.plan.hardware import GPUS_A_NODE
from icrl_megatron.shape import Qwen3Shape


@dataclass(frozen=True)
class Layout:
    """The part of the settings that a search may move, on a number of GPUs."""

    gpus: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    """Context parallel size: planned for, and not offered by the actor yet."""
    sequence_parallel: bool = False
    recompute: str = "full"
    micro_batch_tokens: int = 16384
    engine_tensor: int = 1
    precision: str = "bf16"
    fp8: str = "off"
    offload: str = "none"
    """What leaves the GPU while episodes are played: none, optimizer, or all (gradients too)."""

    @property
    def cell(self) -> int:
        """GPUs of one replica of the actor."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        return self.gpus // self.cell

    @property
    def engines(self) -> int:
        return self.gpus // self.engine_tensor

    @property
    def item(self) -> int:
        """Bytes of a weight."""
        return 2 if self.precision == "bf16" else 4

    @property
    def sequence_share(self) -> float:
        """Share of a micro-batch's tokens whose norms and residuals one GPU holds."""
        return 1 / (self.context * (self.tensor if self.sequence_parallel else 1))

    def spans_nodes(self, ranks: int) -> bool:
        """Whether a group of `ranks` neighbouring ranks leaves a node."""
        return ranks > GPUS_A_NODE

    @staticmethod
    def of(settings: Settings, gpus: int) -> Layout:
        actor = settings.actor
        return Layout(
            gpus=gpus,
            tensor=actor.tensor_parallel,
            pipeline=actor.pipeline_parallel,
            sequence_parallel=actor.sequence_parallel,
            recompute=actor.recompute,
            micro_batch_tokens=actor.micro_batch_tokens,
            engine_tensor=settings.engine.tensor_parallel,
            precision=actor.precision,
            fp8=actor.fp8,
            offload=actor.offload,
        )

    def refusal(self, shape: Qwen3Shape, episodes: int) -> str | None:
        """Why this layout cannot be run at all, or None. `episodes` are those of a step."""
        if self.gpus % self.cell:
            return f"TP x PP x CP = {self.cell} does not divide {self.gpus} GPUs"
        if self.gpus % self.engine_tensor:
            return f"engine TP {self.engine_tensor} does not divide {self.gpus} GPUs"
        if self.tensor > GPUS_A_NODE or self.engine_tensor > GPUS_A_NODE:
            return f"tensor parallel beyond the {GPUS_A_NODE} GPUs of a node"
        for what, count in (("attention heads", shape.heads), ("key-value heads", shape.kv_heads), ("MLP", shape.ffn)):
            if count % self.tensor:
                return f"TP {self.tensor} does not divide the {count} {what}"
        if shape.heads % self.engine_tensor:
            return f"engine TP {self.engine_tensor} does not divide the {shape.heads} attention heads"
        if shape.layers % self.pipeline:
            return f"PP {self.pipeline} does not divide the {shape.layers} layers"
        if self.data > episodes:
            return f"{self.data} replicas share {episodes} episodes a step"
        return None

    def checked(self, shape: Qwen3Shape, episodes: int) -> Layout:
        """Itself. Raises ConfigError where it cannot be run."""
        refusal = self.refusal(shape, episodes)
        if refusal:
            raise ConfigError(
                f"{refusal}; change actor.tensor_parallel, actor.pipeline_parallel or engine.tensor_parallel, or plan "
                "for another number with --gpus"
            )
        return self

    def but(self, **changes: object) -> Layout:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Counts:
    """Parameters, by where they lie."""

    layer: int
    embedding: int
    """Of one of the two embeddings; the output one is the same tensor where the model ties them."""
    total: int


def counts(shape: Qwen3Shape) -> Counts:
    """Parameters of the whole model (q, k, v, o; gate, up, down; two layer norms and two of q and k; final norm)."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (2 * query + 2 * key_value)
    layer = attention + 3 * shape.hidden * shape.ffn + 2 * shape.hidden + 2 * shape.head_dim
    embedding = shape.vocab * shape.hidden
    total = shape.layers * layer + embedding * (1 if shape.tied else 2) + shape.hidden
    return Counts(layer, embedding, total)


def local_parameters(shape: Qwen3Shape, layout: Layout) -> int:
    """Parameters on a GPU of the fullest pipeline stage: TP splits matrices and the padded vocabulary, not norms."""
    count = counts(shape)
    norms = 2 * shape.hidden + 2 * shape.head_dim
    layer = (count.layer - norms) // layout.tensor + norms
    embedding = shape.padded_vocab(layout.tensor) // layout.tensor * shape.hidden
    layers = shape.layers // layout.pipeline * layer
    if layout.pipeline == 1:
        return layers + embedding * (1 if shape.tied else 2) + shape.hidden
    # The first stage has the embedding, the last one the output projection (a copy of it where they are tied).
    return layers + embedding + shape.hidden


def engine_parameters(shape: Qwen3Shape, engine_tensor: int) -> int:
    """Parameters on one GPU of an engine; key-value heads are copied where there are fewer than GPUs."""
    return counts(shape).total // engine_tensor


def kv_bytes_a_token(shape: Qwen3Shape, engine_tensor: int, item: int) -> float:
    """Bytes of key-value cache that one token takes on one GPU of an engine."""
    heads = max(1, shape.kv_heads // engine_tensor)
    return 2.0 * shape.layers * heads * shape.head_dim * item
