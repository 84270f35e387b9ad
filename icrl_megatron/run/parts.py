"""What computes in a run: the model, the engines behind the weight sync, the tasks, and where episodes come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from icrl_megatron.actor.actor import Actor
from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.rollout.source import EpisodeSource
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.run.watch import NoWatch, Watch
from icrl_megatron.settings.schema import Settings
from icrl_megatron.types import Episode


class Weights(Protocol):
    """Hands the actor's weights to the engines: `engines.sync.WeightSync`, or `NoEngines`."""

    version: int
    memory_gib: dict[str, float]

    def sleep(self) -> None:
        """The engines give their memory to the actor until the next push."""
        ...

    def push(self) -> int:
        """Hands over the current weights, wakes the engines and returns the new version."""
        ...


class NoEngines:
    """Supervised training has no engine that could use the weights."""

    def __init__(self) -> None:
        self.version = 0
        self.memory_gib: dict[str, float] = {}

    def sleep(self) -> None:
        """Nothing to do."""

    def push(self) -> int:
        return self.version


@dataclass(frozen=True)
class Parts:
    """One rank's share of everything that computes."""

    settings: Settings
    grid: Grid
    actor: Actor
    sync: Weights
    source: EpisodeSource
    sampler: TaskSampler
    credit: Callable[[Sequence[Episode]], CreditReport]
    """What each token of the episodes earned: `algo.credit`, or a constant for demonstrations."""
    rate: Callable[[int], float]
    """Step, from 0 -> learning rate."""
    watch: Watch | NoWatch
    purpose: str = "train"
    """Part of every seed of training episodes."""

    def seeds(self, step: int, resample: int = 0, purpose: str = "") -> Seeds:
        purpose = purpose or self.purpose
        return Seeds(self.settings.seed, step, purpose if resample == 0 else f"{purpose}/{resample}")
