"""The components of a run that compute: model, engines behind the weight sync, tasks, and episode source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from icrl_megatron.actor.actor import Actor
from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.data.packing import Prompt, pack
from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.distributed.platform import token_multiple
from icrl_megatron.model.flops import SampleFlops
from icrl_megatron.rollout.source import EpisodeSource
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.run.watch import NoWatch, Watch
from icrl_megatron.settings.schema import Settings
from icrl_megatron.types import Episode, Sample, StepPlan


class Weights(Protocol):
    """Sends the actor's weights to the engines: `engines.sync.WeightSync`, or `NoEngines`."""

    version: int
    memory_gib: dict[str, float]

    def sleep(self) -> None:
        """The engines release their memory for the actor until the next push."""
        ...

    def push(self) -> int:
        """Sends the current weights, wakes the engines and returns the new version."""
        ...


class NoEngines:
    """For supervised training, which has no engines."""

    def __init__(self) -> None:
        self.version = 0
        self.memory_gib: dict[str, float] = {}

    def sleep(self) -> None:
        """Does nothing."""

    def push(self) -> int:
        return self.version


@dataclass(frozen=True)
class Parts:
    """One rank's components."""

    settings: Settings
    grid: Grid
    actor: Actor
    sync: Weights
    source: EpisodeSource
    sampler: TaskSampler
    credit: Callable[[Sequence[Episode]], CreditReport]
    """Computes the credit of each token of the episodes: `algo.credit`, or a constant for demonstrations."""
    rate: Callable[[int], float]
    """Learning rate of a step, counted from 0."""
    watch: Watch | NoWatch
    purpose: str = "train"
    """Part of every seed of training episodes."""

    def pack(self, samples: Sequence[Sample], prompt: Prompt = "train", counted: int = 0) -> StepPlan:
        """The plan of this rank's replica (`data.packing.pack`)."""
        settings, actor = self.settings, self.settings.actor
        return pack(
            samples,
            settings.algo,
            micro_batch_tokens=actor.micro_batch_tokens,
            align=token_multiple(actor),
            replica=self.grid.data_rank,
            replicas=self.grid.data,
            prompt=prompt,
            counted=counted,
            flops=SampleFlops.of(self.actor.shape, settings),
        )

    def seeds(self, step: int, resample: int = 0, purpose: str = "") -> Seeds:
        purpose = purpose or self.purpose
        return Seeds(self.settings.seed, step, purpose if resample == 0 else f"{purpose}/{resample}")
