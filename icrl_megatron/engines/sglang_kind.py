"""`engine.kind=sglang`: SGLang servers that the run starts, or external ones. Imports no torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from icrl_megatron.engines.kind import EngineRequest, ServerKind
from icrl_megatron.engines.sglang_server import CONTEXT_SPARE, check_version, installed_version
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings, Settings
from icrl_megatron.utils.errors import ConfigError

if TYPE_CHECKING:
    from icrl_megatron.engines.rank import Engines

_OURS = ("--host", "--port", "--api-key", "--admin-api-key", "--config", "--dist-init-addr", "--nnodes")
"""Server arguments that the run sets itself: they define where the server listens and who may use it."""


class SGLang(ServerKind):
    quantizes = True
    pausable = True
    own_ranks = True
    deltas = True
    spare_tokens = CONTEXT_SPARE

    def verifies(self, engine: EngineSettings) -> bool:
        return not engine.quantization  # quantized weights have other values

    def check_ranks(self, settings: Settings, world: int, on_node: int) -> None:
        super().check_ranks(settings, world, on_node)
        if not settings.engine.urls:
            _check_arguments(settings.engine)

    def check_shape(self, engine: EngineSettings, shape: ModelShape) -> None:
        size = engine.tensor_parallel
        if engine.urls or shape.splits_over(size):
            return
        fits = " or ".join(str(n) for n in range(1, size) if shape.splits_over(n))
        raise ConfigError(
            f"engine.tensor_parallel={size}: SGLang cannot split the model's {shape.heads} attention heads, "
            f"{shape.kv_heads} key-value heads and MLP width {shape.ffn} over {size} GPUs; {fits} would do"
        )

    def check_installed(self, engine: EngineSettings) -> None:
        if not engine.urls:
            check_version(installed_version(engine.python), engine, f"engine.python={engine.python or sys.executable}")

    def build(self, request: EngineRequest) -> Engines:
        from icrl_megatron.engines.sglang_build import build  # lazy: imports torch

        return build(request)


def _check_arguments(engine: EngineSettings) -> None:
    refused = [a for a in engine.server_args if a.startswith("--preferred-sampling-params")]
    if refused:
        raise ConfigError(f"engine.server_args has {refused[0]}: log-probs would not be those of the policy; drop it")
    for argument in engine.server_args:
        name = argument.partition("=")[0]
        if name in _OURS:
            raise ConfigError(
                f"engine.server_args has {name}, which the run sets itself: its servers listen on loopback, with their "
                "own key; drop it, or start the server yourself and name it in engine.urls"
            )


KIND = SGLang()
