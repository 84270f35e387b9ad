"""`engine.kind=local`: a transformers model in each rank's own process."""

from __future__ import annotations

from icrl_megatron.engines.kind import EngineKind, EngineRequest
from icrl_megatron.engines.rank import Engines


class Local(EngineKind):
    pausable = True

    def build(self, request: EngineRequest) -> Engines:
        from icrl_megatron.engines.local import LocalEngine  # lazy: imports torch and transformers

        engine, dtype, device, grid = request.settings.engine, request.dtype, request.device, request.grid
        share = self.share(request.settings, grid.rank, grid.world)
        solver = LocalEngine(request.folder, engine, dtype, device, request.weights)
        critic = LocalEngine(request.critic, engine, dtype, device) if request.critic is not None else None
        return Engines(solver, solver, critic, share)


KIND = Local()
