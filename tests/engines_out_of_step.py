"""`engine.kind=engines_out_of_step:KIND`: a local engine of the first rank. After version LAST it takes no weights, and
says that it has them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from icrl_megatron.engines.kind import EngineKind, EngineRequest
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.rank import Engines, Share

LAST = 4


class _Engine(LocalEngine):
    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        if version <= LAST:
            super().update_weights(tensors, version)
        self._version = version


class _Kind(EngineKind):
    pausable = True

    def share(self, settings: object, rank: int, world: int) -> Share:
        return Share(0 if rank == 0 else None, 1)

    def build(self, request: EngineRequest) -> Engines:
        engine = request.settings.engine
        solver = _Engine(request.folder, engine, request.dtype, request.device, request.weights)
        return Engines(solver, solver, None, Share(0, 1))


KIND = _Kind()
