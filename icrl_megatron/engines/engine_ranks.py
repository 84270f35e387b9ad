"""Engines on ranks of their own (`launch.engine_ranks`): what is refused, and which server uses which GPUs. No torch.

The last ranks of each machine serve. They are not processes of the trainer: each of their servers is started and
watched by a rank that trains on the same machine, as a server on the trainer's own GPUs is.
"""

from __future__ import annotations

from dataclasses import dataclass

from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class EngineRanks:
    """The ranks of one machine. GPUs are numbered as the machine's ranks are."""

    training: int
    serving: int
    tensor_parallel: int
    """GPUs of a server."""

    @staticmethod
    def of(settings: Settings, training: int) -> EngineRanks:
        """On a machine on which `training` ranks train."""
        return EngineRanks(training, settings.launch.engine_ranks, settings.engine.tensor_parallel)

    @property
    def servers(self) -> int:
        return self.serving // self.tensor_parallel

    def first_gpu(self, local_rank: int) -> int:
        """The first GPU of the server that is led by this rank's group of training ranks."""
        return self.training + local_rank // (self.training // self.servers) * self.tensor_parallel

    def require_gpus(self, found: int) -> None:
        """Raises ConfigError if the machine has fewer GPUs (`found`) than ranks."""
        if found < self.training + self.serving:
            raise ConfigError(
                f"launch.engine_ranks={self.serving} and {self.training} training ranks need "
                f"{self.training + self.serving} GPUs on each machine, and {found} are visible here; lower "
                "launch.ranks or launch.engine_ranks"
            )


def check(settings: Settings, supported: bool) -> None:
    """Raises ConfigError for settings that contradict `launch.engine_ranks`, on any number of ranks. `supported`:
    whether the kind of engine can have ranks of its own."""
    engine, given = settings.engine, f"launch.engine_ranks={settings.launch.engine_ranks}"
    if not settings.launch.engine_ranks:
        return
    if not supported:
        raise ConfigError(
            f"{given}: engine.kind={engine.kind} cannot run on ranks of its own; set engine.kind=sglang, or "
            "launch.engine_ranks=0"
        )
    if engine.urls:
        raise ConfigError(
            f"{given} with engine.urls={engine.urls}: the run would start servers and not use them; set "
            "launch.engine_ranks=0, or leave engine.urls empty"
        )
    if engine.servers:
        raise ConfigError(
            f"{given} with engine.servers={engine.servers}: there is one server per engine.tensor_parallel engine "
            "ranks; leave engine.servers out"
        )
    if settings.rollout.critic == "frozen":
        raise ConfigError(
            f"{given} with rollout.critic=frozen, which needs a second server: not supported on engine ranks; set "
            "launch.engine_ranks=0, or use another critic in a new run"
        )
    if settings.launch.engine_ranks % engine.tensor_parallel:
        raise ConfigError(
            f"{given} is not a multiple of engine.tensor_parallel={engine.tensor_parallel}, the GPUs of one server; "
            "use a multiple of it, or lower engine.tensor_parallel"
        )


def check_machine(ranks: EngineRanks) -> None:
    """Raises ConfigError if the servers of a machine cannot be divided among the ranks that train there."""
    if ranks.servers and ranks.training % ranks.servers:
        raise ConfigError(
            f"launch.engine_ranks={ranks.serving} of engine.tensor_parallel={ranks.tensor_parallel} are "
            f"{ranks.servers} servers on a machine, which its {ranks.training} training ranks cannot share evenly; "
            "raise engine.tensor_parallel, or change launch.engine_ranks"
        )
