"""How the GPUs are shared out, and what of the model lies on one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from icrl_megatron.distributed.job_size import training_of
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.model.flops import counts
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.plan.hardware import GPUS_A_NODE
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class Serving:
    """What the settings say of the engines, and no search moves."""

    kind: str = "sglang"
    """Its name (engine.kind), for messages."""
    local: bool = False
    """A model in each rank's own process, e.g. engine.kind=local."""
    remote: bool = False
    """External servers, on other GPUs (engine.urls)."""
    servers: int | None = None
    """How many there are (engine.servers, or those of engine.urls); None: one per engine TP ranks."""
    own_ranks: int = 0
    """GPUs of each machine that only serve engines (launch.engine_ranks)."""
    fp8: bool = False
    """engine.quantization=fp8: the layers' matrices take one byte a parameter."""
    most_running: int = 256
    """Sequences that an engine decodes at once: no more than engine.max_batch requests and rollout.concurrency
    episodes, each of which has one request at a time."""
    on_a_gpu: int = 1
    """Engines that share a GPU: two with a frozen critic."""
    spare_tokens: int = 0
    """Tokens of its cache that an engine keeps for itself."""
    tensor_parallel: bool = True
    """Whether one engine may use several GPUs."""

    @staticmethod
    def of(settings: Settings) -> Serving:
        engine, kind = settings.engine, engine_kind(settings.engine.kind)
        taken = kind.gpu_memory(engine)
        return Serving(
            kind=engine.kind,
            local=taken == "what is left",
            remote=taken == "none",
            servers=len(engine.urls) or engine.servers,
            own_ranks=settings.launch.engine_ranks,
            fp8=engine.quantization == "fp8" and kind.quantizes,
            most_running=min(engine.max_batch, settings.rollout.concurrency),
            on_a_gpu=2 if settings.rollout.critic == "frozen" else 1,
            spare_tokens=kind.spare_tokens,
            tensor_parallel=kind.tensor_parallel,
        )


@dataclass(frozen=True)
class Layout:
    """The part of the settings that a search may move, on a number of GPUs."""

    gpus: int
    """Those that train. Engines are on the same ones, or on others (`engine_gpus`)."""
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False
    recompute: str = "full"
    micro_batch_tokens: int = 16384
    engine_tensor: int = 1
    precision: str = "bf16"
    fp8: str = "off"
    offload: str = "none"
    """What leaves the GPU while episodes are played: none, optimizer, or all (gradients too)."""
    memory_fraction: float = 0.7
    """Share of a GPU that SGLang's weights and cache take."""
    serving: Serving = Serving()
    node: int = GPUS_A_NODE
    """GPUs of a machine that train."""

    @property
    def cell(self) -> int:
        """GPUs of one replica of the actor."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        return self.gpus // self.cell

    @property
    def engine_gpus(self) -> int:
        """GPUs that only serve engines."""
        return self.serving.own_ranks * math.ceil(self.gpus / self.node)

    @property
    def all_gpus(self) -> int:
        return self.gpus + self.engine_gpus

    @property
    def engines(self) -> int:
        return self.serving.servers or max(1, (self.engine_gpus or self.gpus) // self.engine_tensor)

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
        return ranks > self.node

    @staticmethod
    def of(settings: Settings, gpus: int, machine: int = 0) -> Layout:
        """On `gpus` GPUs, engine ranks included, of which a machine has `machine`; 0: GPUS_A_NODE, or `launch.ranks` if
        engines have some of these. Raises ConfigError if engines leave none of a machine, or have ranks of their own
        and the machines are not whole."""
        actor, serving = settings.actor, Serving.of(settings)
        machine = machine or (settings.launch.ranks if serving.own_ranks else GPUS_A_NODE)
        training = training_of(settings, machine)
        if serving.own_ranks and gpus % machine:
            raise ConfigError(
                f"launch.engine_ranks={serving.own_ranks} of the {machine} GPUs of each machine: {gpus} GPUs are not "
                f"whole machines; plan for a multiple of {machine} with --gpus, or change launch.ranks"
            )
        return Layout(
            gpus=gpus - serving.own_ranks * (gpus // machine),
            node=training,
            tensor=actor.tensor_parallel,
            pipeline=actor.pipeline_parallel,
            context=actor.context_parallel,
            sequence_parallel=actor.sequence_parallel,
            recompute=actor.recompute,
            micro_batch_tokens=actor.micro_batch_tokens,
            engine_tensor=settings.engine.tensor_parallel,
            precision=actor.precision,
            fp8=actor.fp8,
            offload=actor.offload,
            memory_fraction=settings.engine.memory_fraction,
            serving=serving,
        )

    def refusal(self, shape: ModelShape, episodes: int) -> str | None:
        """Why this layout cannot be run at all, or None. `episodes` are those of a step."""
        if self.gpus % self.node and (self.gpus > self.node or self.serving.own_ranks):
            return f"{self.all_gpus} GPUs are not whole nodes of {self.node + self.serving.own_ranks}"
        if self.gpus % self.cell:
            return f"TP x PP x CP = {self.cell} does not divide {self.gpus} GPUs"
        return self._engines_refusal(shape) or self._split_refusal(shape, episodes)

    def _engines_refusal(self, shape: ModelShape) -> str | None:
        """As `EngineKind.check_ranks`, which `icrl train` calls."""
        tensor, servers = self.engine_tensor, self.serving.servers
        if not self.serving.tensor_parallel and tensor > 1:
            return f"engine TP {tensor}: engine.kind={self.serving.kind} has only 1"
        if self.serving.local and servers:
            return f"engine.servers and engine.urls are for servers, not for engine.kind={self.serving.kind}"
        if self.serving.remote and self.serving.on_a_gpu > 1:
            return "engine.urls starts no server for a frozen critic"
        if self.serving.own_ranks:
            return self._own_ranks_refusal() or self._engine_split_refusal(shape)
        if self.gpus % tensor:
            return f"engine TP {tensor} does not divide {self.gpus} GPUs"
        if tensor > GPUS_A_NODE:
            return f"engine TP {tensor} is beyond the {GPUS_A_NODE} GPUs of a node"
        if servers and (self.gpus % servers or (self.gpus // servers < tensor and not self.serving.remote)):
            return f"{servers} servers of engine TP {tensor} do not share {self.gpus} GPUs evenly"
        return self._engine_split_refusal(shape)

    def _own_ranks_refusal(self) -> str | None:
        """As `engine_ranks.check` and `check_machine`."""
        serving, tensor = self.serving.own_ranks, self.engine_tensor
        if serving % tensor:
            return f"engine TP {tensor} does not divide the {serving} engine ranks of a node"
        if self.node % (serving // tensor):
            return f"{self.node} training ranks of a node do not share its {serving // tensor} engines evenly"
        return None

    def _engine_split_refusal(self, shape: ModelShape) -> str | None:
        tensor = self.engine_tensor
        if not shape.splits_over(tensor):
            return (
                f"engine TP {tensor} does not fit {shape.heads} attention heads, {shape.kv_heads} key-value heads and "
                f"MLP width {shape.ffn}"
            )
        return None

    def _split_refusal(self, shape: ModelShape, episodes: int) -> str | None:
        if self.tensor > GPUS_A_NODE:
            return f"tensor parallel beyond the {GPUS_A_NODE} GPUs of a node"
        for what, count in (("attention heads", shape.heads), ("key-value heads", shape.kv_heads), ("MLP", shape.ffn)):
            if count % self.tensor:
                return f"TP {self.tensor} does not divide the {count} {what}"
        if shape.layers % self.pipeline:
            return f"PP {self.pipeline} does not divide the {shape.layers} layers"
        if self.data > episodes:
            return f"{self.data} replicas share {episodes} episodes a step"
        return None

    def checked(self, shape: ModelShape, episodes: int) -> Layout:
        """Itself. Raises ConfigError where it cannot be run."""
        refusal = self.refusal(shape, episodes)
        if refusal:
            raise ConfigError(
                f"{refusal}; change actor.tensor_parallel, actor.pipeline_parallel, actor.context_parallel, "
                "engine.tensor_parallel, engine.servers or launch.engine_ranks, or plan for another number with --gpus"
            )
        return self

    def but(self, **changes: object) -> Layout:
        return replace(self, **changes)  # type: ignore[arg-type]


def local_parameters(shape: ModelShape, layout: Layout) -> int:
    """Parameters on a GPU of the fullest pipeline stage: TP splits matrices, biases and the padded vocabulary, not
    norms."""
    count = counts(shape)
    layer = (count.layer - count.norms) // layout.tensor + count.norms
    embedding = shape.padded_vocab(layout.tensor) // layout.tensor * shape.hidden
    layers = shape.layers // layout.pipeline * layer
    if layout.pipeline == 1:
        return layers + embedding * (1 if shape.tied else 2) + shape.hidden
    # The first stage has the embedding, the last one the output projection (a copy of it where they are tied).
    return layers + embedding + shape.hidden


def engine_parameters(shape: ModelShape, engine_tensor: int) -> int:
    """Parameters on one GPU of an engine. With fewer key-value heads than GPUs, each GPU has a copy of one."""
    key_value = 2 * shape.kv_heads * shape.head_dim * (shape.hidden + shape.family.qkv_bias) * shape.layers
    copied = key_value * max(1, engine_tensor // shape.kv_heads)
    return (counts(shape).total - key_value + copied) // engine_tensor


def engine_bytes(shape: ModelShape, layout: Layout) -> float:
    """Bytes of one engine's weights on one GPU. SGLang's online FP8 quantises the layers' matrices alone; scales are
    below a thousandth of them."""
    saved = shape.layers * counts(shape).linear * (layout.item - 1) if layout.serving.fp8 else 0
    return float(engine_parameters(shape, layout.engine_tensor) * layout.item - saved // layout.engine_tensor)


def kv_bytes_a_token(shape: ModelShape, engine_tensor: int, item: int) -> float:
    """Bytes of key-value cache that one token takes on one GPU of an engine."""
    heads = max(1, shape.kv_heads // engine_tensor)
    return 2.0 * shape.layers * heads * shape.head_dim * item
