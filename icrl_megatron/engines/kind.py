"""The interface of an engine kind for the trainer, the planner and `icrl eval`. Imports no torch.

A kind is one object, registered in `registry.py`. No other code in the package depends on which kind a run uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icrl_megatron.distributed import job_size
from icrl_megatron.engines import server_checks
from icrl_megatron.engines.engine_ranks import EngineRanks
from icrl_megatron.engines.rank import Share, lead_rank
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings, Settings
from icrl_megatron.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from icrl_megatron.distributed.grid import Grid
    from icrl_megatron.engines.rank import Engines

GpuMemory = Literal["what is left", "a fraction", "none"]
"""How an engine uses the GPUs of its ranks. "what is left": it runs in the rank's process, its weights are in host
memory while it sleeps, and its cache grows into free memory. "a fraction": it takes `engine.memory_fraction` of each
GPU and releases it while the actor trains. "none": it runs on other GPUs."""


@dataclass(frozen=True)
class EngineRequest:
    """Inputs for building a rank's engines. All ranks make the same request, each with its own `grid.rank`."""

    settings: Settings
    folder: Path
    """Hugging Face folder of the model."""
    grid: Grid
    dtype: torch.dtype
    device: torch.device
    logs: Path
    """Folder for server logs."""
    weights: bool = True
    """Whether `folder` has weights. If not, the first push sends all of them."""
    critic: Path | None = None
    """Folder of a second model, whose weights never change."""
    synced: bool = True
    """Whether the trainer pushes weights before the first request. If not, the engine uses the weights in `folder`."""
    server_device: torch.device | None = None
    """In a rollout process that starts its server (`launch.engine_ranks`, `rollout.interleave`): where the server of
    the rank's group runs; its other GPUs follow. None: on `device`."""


class EngineKind:
    """The defaults describe an engine inside the rank's own process. A kind overrides what differs."""

    before_actor = False
    """Whether engines are built before the actor, so that servers start while the actor is built. An in-process engine
    is built after the actor, because the actor's messages about a broken model folder are better."""
    needs_folder = ""
    """Why a resumed run still needs the weights in the model's folder; empty if it does not need them."""
    tensor_parallel = False
    """Whether one engine may use several GPUs (`engine.tensor_parallel`)."""
    quantizes = False
    """Whether `engine.quantization` applies."""
    pausable = False
    """Whether the weights of an engine can change while its requests are unfinished (`engines.protocol.Pausable`)."""
    own_ranks = False
    """Whether engines may have ranks of their own (`launch.engine_ranks`)."""
    deltas = False
    """Whether `engine.sync=delta` applies."""
    spare_tokens = 0
    """KV cache tokens that the engine reserves for itself, beyond `rollout.context_tokens`."""

    def share(self, settings: Settings, rank: int, world: int) -> Share:
        """The part of the tasks that a rank plays."""
        return Share(rank, world)

    def verifies(self, engine: EngineSettings) -> bool:
        """Whether the engine's weights can be compared with those it was sent. If so, the receivers of all ranks that
        lead an engine are `Verifiable`."""
        return False

    def gpu_memory(self, engine: EngineSettings) -> GpuMemory:
        """The GPU memory that the planner charges to the ranks."""
        return "what is left"

    def check(self, settings: Settings) -> None:
        """Raises ConfigError for settings that this kind does not support, on any number of ranks."""

    def check_ranks(self, settings: Settings, world: int, on_node: int) -> None:
        """Raises ConfigError if the engines do not fit `world` ranks that train, `on_node` of them per node."""
        engine = settings.engine
        server_checks.check_key(engine)
        server_checks.check_sync(settings, self.deltas)
        if engine.tensor_parallel > 1:
            raise ConfigError(f"engine.tensor_parallel={engine.tensor_parallel}: engine.kind={engine.kind} has only 1")
        if engine.urls or engine.servers:
            raise ConfigError(
                "engine.urls and engine.servers are for servers: set engine.kind=sglang, or leave them empty"
            )

    def check_shape(self, engine: EngineSettings, shape: ModelShape) -> None:
        """Raises ConfigError if an engine cannot shard a model of this shape over its GPUs."""

    def check_installed(self, engine: EngineSettings) -> None:
        """Raises ConfigError if the engine's software is missing or has an unsupported version."""

    def build(self, request: EngineRequest) -> Engines:
        """Builds this rank's engines. Starts servers unless they start `in_turn`, and does not wait for them.
        Collective over all ranks. Raises ConfigError if the settings describe an engine that cannot be built."""
        raise NotImplementedError


def server_count(settings: Settings, world: int) -> int:
    """The number of servers for `world` ranks that train."""
    engine = settings.engine
    if settings.launch.engine_ranks:
        on_node = job_size.ranks_on_node(settings)
        return world // on_node * EngineRanks.of(settings, on_node).servers
    return len(engine.urls) or engine.servers or max(1, world // engine.tensor_parallel)


def server_share(settings: Settings, rank: int, world: int) -> Share:
    """The tasks of the server that `rank` leads; none for a rank that leads no server."""
    servers = server_count(settings, world)
    leads = rank == lead_rank(rank, world, servers)
    return Share(rank // (world // servers) if leads else None, servers)


class ServerKind(EngineKind):
    """An engine that is a server: started by the first rank of a group, on the GPUs of the group or on others
    (`launch.engine_ranks`), or external (`engine.urls`)."""

    before_actor = True
    needs_folder = "its servers load the model's folder when they start"
    tensor_parallel = True

    def share(self, settings: Settings, rank: int, world: int) -> Share:
        return server_share(settings, rank, world)

    def gpu_memory(self, engine: EngineSettings) -> GpuMemory:
        return "none" if engine.urls else "a fraction"

    def check(self, settings: Settings) -> None:
        server_checks.check_cache(settings)

    def check_ranks(self, settings: Settings, world: int, on_node: int) -> None:
        server_checks.check_key(settings.engine)
        server_checks.check_sync(settings, self.deltas)
        if settings.engine.urls:  # external servers have their own GPUs
            server_checks.check_urls(settings, world)
        elif not settings.launch.engine_ranks:
            server_checks.check_groups(settings.engine, world, on_node)
