"""What the trainer, the planner and `icrl eval` need to know about a kind of engine. Imports no torch.

A kind is one object, named in `registry.py`. Nothing else in the package asks which kind a run uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icrl_megatron.engines import server_checks
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings, Settings
from icrl_megatron.utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from icrl_megatron.distributed.grid import Grid
    from icrl_megatron.engines.rank import Engines

GpuMemory = Literal["what is left", "a fraction", "none"]
"""What an engine takes of its ranks' GPUs. "what is left": it lives in the rank's process, its weights sleep in host
memory, and its cache grows into free memory. "a fraction": `engine.memory_fraction` of each GPU, given back while the
actor trains. "none": it runs on other GPUs."""


@dataclass(frozen=True)
class EngineRequest:
    """What a rank's engines are built from. All ranks make the same request, each with its own `grid.rank`."""

    settings: Settings
    folder: Path
    """Hugging Face folder of the model."""
    grid: Grid
    dtype: torch.dtype
    device: torch.device
    logs: Path
    """Folder for the logs of servers."""
    weights: bool = True
    """Whether `folder` has weights. If not, the engine gets all of them from the first push."""
    critic: Path | None = None
    """Folder of a second model, whose weights never change."""
    synced: bool = True
    """Whether the trainer pushes weights before it asks for tokens. If not, the engine uses those of `folder`."""


class EngineKind:
    """The defaults describe an engine inside the rank's own process. A kind overrides what differs."""

    before_actor = False
    """Whether engines are built before the actor, so that servers start while the actor is built. An engine in the
    rank's process is built after the actor, whose messages about a broken model folder are better."""
    needs_folder = ""
    """Why a resumed run still needs the weights in the model's folder; empty if it does not."""
    tensor_parallel = False
    """Whether one engine may use several GPUs (`engine.tensor_parallel`)."""
    quantizes = False
    """Whether `engine.quantization` applies."""
    spare_tokens = 0
    """Tokens of the KV cache that the engine keeps for itself, beyond `rollout.context_tokens`."""

    def verifies(self, engine: EngineSettings) -> bool:
        """Whether the weights that an engine holds can be compared with those it was sent. If so, the receivers of all
        ranks that lead an engine are `Verifiable`."""
        return False

    def gpu_memory(self, engine: EngineSettings) -> GpuMemory:
        """What the planner charges the ranks' GPUs."""
        return "what is left"

    def check(self, settings: Settings) -> None:
        """Raises ConfigError for settings that this kind cannot work with, on any number of ranks."""

    def check_ranks(self, settings: Settings, world: int, on_node: int) -> None:
        """Raises ConfigError if the engines do not fit `world` ranks, `on_node` of them on each node."""
        engine = settings.engine
        server_checks.check_key(engine)
        if engine.tensor_parallel > 1:
            raise ConfigError(f"engine.tensor_parallel={engine.tensor_parallel}: engine.kind={engine.kind} has only 1")
        if engine.urls or engine.servers:
            raise ConfigError(
                "engine.urls and engine.servers are for servers: set engine.kind=sglang, or leave them empty"
            )

    def check_shape(self, engine: EngineSettings, shape: ModelShape) -> None:
        """Raises ConfigError if an engine cannot split a model of this shape over its GPUs."""

    def check_installed(self, engine: EngineSettings) -> None:
        """Raises ConfigError if the engine's software is missing or has an unsupported version."""

    def build(self, request: EngineRequest) -> Engines:
        """This rank's engines. Servers are started unless they start `in_turn`, and not waited for. All ranks call it
        together. Raises ConfigError if an engine cannot be what the settings say."""
        raise NotImplementedError


class ServerKind(EngineKind):
    """An engine that is a server with GPUs of its ranks, started by the first rank of a group, or one that runs
    elsewhere (`engine.urls`)."""

    before_actor = True
    needs_folder = "its servers load the model's folder when they start"
    tensor_parallel = True

    def gpu_memory(self, engine: EngineSettings) -> GpuMemory:
        return "none" if engine.urls else "a fraction"

    def check(self, settings: Settings) -> None:
        server_checks.check_cache(settings)

    def check_ranks(self, settings: Settings, world: int, on_node: int) -> None:
        server_checks.check_key(settings.engine)
        if settings.engine.urls:  # the GPUs of those servers are not ours
            server_checks.check_urls(settings, world)
        else:
            server_checks.check_groups(settings.engine, world, on_node)
