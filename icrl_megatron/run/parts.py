"""The components of a run that compute: model, engines behind the weight sync, tasks, and episode source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from icrl_megatron.actor.actor import Actor
from icrl_megatron.actor.measure import Totals
from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.algo.headers import EpisodeHeader
from icrl_megatron.algo.samples import to_samples, tokens_of
from icrl_megatron.data.delivery import deliver, send_back
from icrl_megatron.data.packing import Prompt, SampleLayout, lay_out, pack
from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.distributed.platform import sequence_multiple, token_multiple
from icrl_megatron.engines.sync import WeightSync
from icrl_megatron.model.flops import SampleFlops
from icrl_megatron.rollout.played import EpisodeSource, Played, Probing
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.run.watch import NoWatch, Watch
from icrl_megatron.settings.schema import Settings
from icrl_megatron.types import Sample, SampleTokens, StepPlan, StepStats


class NoEngines:
    """In place of a `WeightSync`, for supervised training, which has no engines."""

    def __init__(self) -> None:
        self.version = 0
        self.memory_gib: dict[str, float] = {}

    def sleep(self) -> None:
        """Does nothing."""

    def push(self) -> int:
        return self.version


@dataclass(frozen=True)
class Delivered:
    """The layout of a step and the tokens of this rank's replica."""

    layout: SampleLayout
    tokens: Mapping[str, SampleTokens]
    align: int
    each: int

    def plan(self, prompt: Prompt = "train") -> StepPlan:
        """The plan of this rank's replica (`data.packing.pack`)."""
        return pack(self.layout, self.tokens, align=self.align, each=self.each, prompt=prompt)


@dataclass(frozen=True)
class Parts:
    """One rank's components."""

    settings: Settings
    grid: Grid
    actor: Actor
    sync: WeightSync | NoEngines
    source: EpisodeSource
    sampler: TaskSampler
    credit: Callable[[Sequence[EpisodeHeader]], CreditReport]
    """Computes the credit of each token of the episodes: `algo.credit`, or a constant for demonstrations."""
    rate: Callable[[int], float]
    """Learning rate of a step, counted from 0."""
    watch: Watch | NoWatch
    purpose: str = "train"
    """Part of every seed of training episodes."""

    def deliver(self, samples: Sequence[Sample], played: Played, counted: int = 0) -> Delivered:
        """Lays out the samples of all ranks and moves their tokens to the replicas that train on them. All ranks call
        it together, with the same samples."""
        layout = lay_out(
            samples,
            self.settings.algo,
            micro_batch_tokens=self.settings.actor.micro_batch_tokens,
            replica=self.grid.data_rank,
            replicas=self.grid.data,
            counted=counted,
            flops=SampleFlops.of(self.actor.shape, self.settings),
        )
        own = {f"{episode.task.task_id}#{episode.index}": episode for episode in played.episodes}

        def tokens(sample: Sample) -> SampleTokens:
            episode = own[sample.episode_id()]
            return tokens_of(episode, sample.role, sample.round, self.settings.algo, played.version)

        actor = self.settings.actor
        return Delivered(layout, deliver(self.grid, layout, tokens), token_multiple(actor), sequence_multiple(actor))

    def probe(self, phase: Callable[[str], AbstractContextManager[None]]) -> Totals | None:
        """Compares the log-probs of engines and actor on replies under the step's weights, which none of its episodes
        may have; `phase` times it. None if the source has no such replies, or no engine has answered. All ranks call it
        together."""
        if not isinstance(self.source, Probing):
            return None
        with phase("probe"):
            probes = self.source.probes()
            samples = [s for of in probes.headers for s in to_samples(of, self.settings.algo, train_critic=False)]
            return self.actor.mismatch(self.deliver(samples, probes).plan()) if samples else None

    def send_back(self, delivered: Delivered, stats: StepStats) -> StepStats:
        """The statistics with the calibration weights of this rank's episodes, instead of those measured here."""
        return replace(stats, calibration_weights=send_back(self.grid, delivered.layout, stats.calibration_weights))

    def seeds(self, step: int, resample: int = 0, purpose: str = "") -> Seeds:
        purpose = purpose or self.purpose
        return Seeds(self.settings.seed, step, purpose if resample == 0 else f"{purpose}/{resample}")
