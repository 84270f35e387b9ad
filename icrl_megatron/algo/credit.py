"""Credit: rewards -> advantages, in groups that share a baseline (paper Eq. 5), and the two published presets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from icrl_megatron.algo.samples import to_samples
from icrl_megatron.headers import EpisodeHeader
from icrl_megatron.settings.algo_schema import AlgoSettings, GroupFilter, Overlong
from icrl_megatron.types import Sample, Task

STD_FLOOR = 1e-6
"""Added to a group's standard deviation (Eq. 5)."""
NO_SPREAD = 1e-8
"""Rewards closer than this are equal, because differences of outcomes have rounding errors that must not become a
signal."""


@dataclass(frozen=True)
class CreditReport:
    """The samples of a step with their advantages, and counts of their groups."""

    samples: tuple[Sample, ...]
    """Sorted by sample_id. Includes samples with advantage 0: they count in the loss normalizer (the mean of
    `sequence_mean` is over the whole batch) and in the KL and entropy terms."""
    groups: int
    """All groups, including dropped ones."""
    flat_groups: int
    """Kept groups whose members all have advantage 0."""
    dropped_groups: int
    """Groups removed by `algo.group_filter`; their samples are not in `samples`."""
    dropped_samples: int
    """Samples of those groups, and revisions beyond `algo.revisions_per_task`."""
    overlong_penalty: float | None = None
    """Mean penalty of `algo.overlong` per sample; None if it is off or there is no sample."""
    counted: tuple[Sample, ...] = ()
    """With `algo.group_filter.counted`: samples of dropped groups that have generated tokens. They have no loss, but
    count in the normalizer."""

    def tasks_with_signal(self) -> set[str]:
        """Ids of the tasks with a token whose advantage is not zero."""
        return {s.task_id() for s in self.samples if s.advantage != 0.0 and s.loss_tokens}

    @property
    def has_signal(self) -> bool:
        """Whether any token of the batch has a nonzero advantage; if not, the batch should be redrawn."""
        return bool(self.tasks_with_signal())

    def first_with_signal(self, count: int, order: Iterable[Task]) -> CreditReport:
        """Only the samples of the first `count` tasks with a signal, in this order. If no task has one, all samples
        stay."""
        signal = self.tasks_with_signal()
        chosen = set([task for task in dict.fromkeys(task.task_id for task in order) if task in signal][:count])
        samples = _of_tasks(self.samples, chosen)
        return replace(self, samples=samples, counted=_of_tasks(self.counted, chosen)) if samples else self


def _of_tasks(samples: Iterable[Sample], tasks: set[str]) -> tuple[Sample, ...]:
    return tuple(s for s in samples if s.task_id() in tasks)


def credit(episodes: Iterable[EpisodeHeader], settings: AlgoSettings, train_critic: bool) -> CreditReport:
    """Samples of all episodes of a step with normalized advantages. The order of the episodes does not matter.

    Raises ConfigError on an outcome outside [0, 1], and ValueError on two episodes of a task with the same index.
    """
    groups: dict[str, list[Sample]] = defaultdict(list)
    samples = [sample for episode in episodes for sample in to_samples(episode, settings, train_critic)]
    surplus = _surplus_revisions(samples, settings.revisions_per_task)
    for sample in samples:
        if sample.sample_id not in surplus:
            groups[sample.group].append(sample)

    kept: list[Sample] = []
    counted: list[Sample] = []
    penalties: list[float] = []
    flat = dropped = 0
    dropped_samples = len(surplus)
    for _, members in sorted(groups.items()):
        members.sort(key=lambda s: s.sample_id)
        if settings.group_filter.enabled and _filtered_out(members, settings.group_filter):
            dropped += 1
            dropped_samples += len(members)
            counted += [m for m in members if m.loss_tokens] if settings.group_filter.counted else []
            continue
        off = [overlong_penalty(m.loss_tokens, settings.overlong) for m in members]
        rewards = [m.reward - penalty for m, penalty in zip(members, off, strict=True)]
        values = advantages(rewards, settings.normalise_std, settings.pseudo_positive, settings.pseudo_positive_alone)
        penalties += off
        flat += not any(values)
        kept += [replace(m, advantage=a) for m, a in zip(members, values, strict=True)]

    kept.sort(key=lambda s: s.sample_id)
    _check_unique(kept)
    penalized = settings.overlong.max_tokens is not None and penalties
    penalty = sum(penalties) / len(penalties) if penalized else None
    return CreditReport(tuple(kept), len(groups), flat, dropped, dropped_samples, penalty, tuple(counted))


def advantages(
    rewards: Sequence[float],
    normalise_std: bool = True,
    pseudo_positive: bool = False,
    pseudo_positive_alone: bool = False,
) -> list[float]:
    """Eq. 5: A_i = (r_i - mean(r)) / (std(r) + 1e-6) over one group; without `normalise_std`, only the mean is
    subtracted.

    The deviation is the sample standard deviation (n - 1): our choice. `pseudo_positive` adds one reward of 1 to the
    values from which mean and deviation are computed, so that a group of failures gets negative advantages. Groups
    without spread (including the pseudo reward) give 0, and so do groups of one, unless `pseudo_positive_alone`.
    """
    baseline = np.asarray([*rewards, 1.0] if pseudo_positive else rewards, dtype=np.float64)
    if len(baseline if pseudo_positive_alone else rewards) < 2 or np.ptp(baseline) < NO_SPREAD:
        return [0.0] * len(rewards)
    centred = np.asarray(rewards, dtype=np.float64) - baseline.mean()
    if normalise_std:
        centred /= baseline.std(ddof=1) + STD_FLOOR
    return [float(a) for a in centred]


def overlong_penalty(tokens: int, overlong: Overlong) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, Eq. 13), which is subtracted from a reward: 0 up to `max_tokens -
    buffer_tokens` generated tokens, then linear up to `factor` at `max_tokens`, and `factor` beyond."""
    if overlong.max_tokens is None:
        return 0.0
    excess = tokens - (overlong.max_tokens - overlong.buffer_tokens)
    return overlong.factor * min(1.0, max(0.0, excess / overlong.buffer_tokens))


def _surplus_revisions(samples: Sequence[Sample], limit: int | None) -> set[str]:
    """Ids of the revisions of each task beyond its `limit` best; equal rewards are ordered by id."""
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples if limit is not None else ():
        if sample.role == "revision":
            by_task[sample.task_id()].append(sample)
    ranked = (sorted(of, key=lambda s: (-s.reward, s.sample_id)) for of in by_task.values())
    return {sample.sample_id for of in ranked for sample in of[limit:]}


def _filtered_out(members: Sequence[Sample], group_filter: GroupFilter) -> bool:
    """True for a group without first attempts that has no success or a too low mean reward."""
    if any(m.role == "attempt" for m in members):
        return False
    rewards = [m.reward for m in members]
    return max(rewards) < 1.0 or float(np.mean(rewards)) < group_filter.min_mean_reward


def _check_unique(samples: Sequence[Sample]) -> None:
    for first, second in pairwise(samples):
        if first.sample_id == second.sample_id:
            raise ValueError(
                f"Sample {first.sample_id!r} is there twice: episodes of the same task need different indices."
            )
