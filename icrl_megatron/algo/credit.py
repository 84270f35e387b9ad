"""Credit: rewards -> advantages, in groups that share a baseline (paper Eq. 5), and the two published presets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from icrl_megatron.algo.headers import EpisodeHeader
from icrl_megatron.algo.samples import to_samples
from icrl_megatron.settings.algo_schema import AlgoSettings, GroupFilter, Overlong
from icrl_megatron.types import Sample, Task

Floats = npt.NDArray[np.float64]

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
    """Samples of all episodes of a step with normalized advantages. The order of the episodes does not matter. Time is
    O(S log S) in the samples, for sorting.

    Raises ConfigError on an outcome outside [0, 1], and ValueError on two episodes of a task with the same index.
    """
    samples = [sample for episode in episodes for sample in to_samples(episode, settings, train_critic)]
    samples.sort(key=attrgetter("sample_id"))
    _check_unique(samples)
    surplus = _surplus_revisions(samples, settings.revisions_per_task)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        if i not in surplus:
            groups[sample.group].append(i)

    kept: list[list[int]] = []
    dropped: list[int] = []
    for _, members in sorted(groups.items()):
        if settings.group_filter.enabled and _filtered_out([samples[i] for i in members], settings.group_filter):
            dropped += members
        else:
            kept.append(members)
    of_groups, sizes = list(chain.from_iterable(kept)), [len(members) for members in kept]
    penalties = _penalties([samples[i] for i in of_groups], settings.overlong)
    rewards_S = np.array([samples[i].reward for i in of_groups], dtype=np.float64) - np.array(penalties)
    values_S = _by_size(rewards_S, sizes, settings)
    signals = len(np.unique(np.repeat(np.arange(len(sizes)), sizes)[values_S != 0.0]))
    by_id = sorted(zip(of_groups, values_S.tolist(), strict=True))
    penalized = settings.overlong.max_tokens is not None and penalties
    return CreditReport(
        samples=tuple(replace(samples[i], advantage=value) for i, value in by_id),
        groups=len(groups),
        flat_groups=len(kept) - signals,
        dropped_groups=len(groups) - len(kept),
        dropped_samples=len(surplus) + len(dropped),
        overlong_penalty=sum(penalties) / len(penalties) if penalized else None,
        counted=tuple(samples[i] for i in dropped if settings.group_filter.counted and samples[i].loss_tokens > 0),
    )


def advantages(rewards_GN: Floats, settings: AlgoSettings) -> Floats:
    """Eq. 5 for G groups of N samples each: A_i = (r_i - mean(r)) / (std(r) + 1e-6) over a group; without
    `normalise_std`, only the mean is subtracted. Every group has the result, to the last bit, that it has alone.

    The deviation is the sample standard deviation (n - 1): our choice. `pseudo_positive` adds one reward of 1 to the
    values from which mean and deviation are computed, so that a group of failures gets negative advantages. Groups
    without spread (including the pseudo reward) give 0, and so do groups of one, unless `pseudo_positive_alone`.
    """
    baseline_GN = rewards_GN
    if settings.pseudo_positive:
        baseline_GN = np.concatenate([rewards_GN, np.ones((len(rewards_GN), 1))], axis=1)
    found_GN = np.zeros_like(rewards_GN)
    if (baseline_GN if settings.pseudo_positive_alone else rewards_GN).shape[1] < 2:
        return found_GN
    spread_G = np.ptp(baseline_GN, axis=1) >= NO_SPREAD
    baseline_GN = baseline_GN[spread_G]
    centred_GN = rewards_GN[spread_G] - baseline_GN.mean(axis=1, keepdims=True)
    if settings.normalise_std:
        centred_GN /= baseline_GN.std(axis=1, ddof=1, keepdims=True) + STD_FLOOR
    found_GN[spread_G] = centred_GN
    return found_GN


def _by_size(rewards_S: Floats, sizes: Sequence[int], settings: AlgoSettings) -> Floats:
    """Advantages [S] of groups that lie one after another, `sizes` samples each. Groups of one size are computed
    together: a call of NumPy costs as much for one group as for thousands."""
    sizes_G = np.array(sizes, dtype=np.int64)
    starts_G, found_S = np.cumsum(sizes_G) - sizes_G, np.zeros_like(rewards_S)
    for size in np.unique(sizes_G).tolist():
        places_GN = starts_G[sizes_G == size][:, None] + np.arange(size)
        found_S[places_GN] = advantages(rewards_S[places_GN], settings)
    return found_S


def overlong_penalty(tokens: int, overlong: Overlong) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, Eq. 13), which is subtracted from a reward: 0 up to `max_tokens -
    buffer_tokens` generated tokens, then linear up to `factor` at `max_tokens`, and `factor` beyond."""
    if overlong.max_tokens is None:
        return 0.0
    excess = tokens - (overlong.max_tokens - overlong.buffer_tokens)
    return overlong.factor * min(1.0, max(0.0, excess / overlong.buffer_tokens))


def _penalties(samples: Sequence[Sample], overlong: Overlong) -> list[float]:
    if overlong.max_tokens is None:
        return [0.0] * len(samples)
    return [overlong_penalty(s.loss_tokens, overlong) for s in samples]


def _surplus_revisions(samples: Sequence[Sample], limit: int | None) -> set[int]:
    """The revisions of each task beyond its `limit` best; those of equal rewards are taken in their order."""
    by_task: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples if limit is not None else ()):
        if sample.role == "revision":
            by_task[sample.task_id()].append(i)
    ranked = (sorted(of, key=lambda i: -samples[i].reward) for of in by_task.values())
    return {i for of in ranked for i in of[limit:]}


def _filtered_out(members: Sequence[Sample], group_filter: GroupFilter) -> bool:
    """True for a group without first attempts that has no success or a too low mean reward."""
    if any(m.role == "attempt" for m in members):
        return False
    rewards = [m.reward for m in members]
    return max(rewards) < 1.0 or float(np.mean(rewards)) < group_filter.min_mean_reward


def _check_unique(samples: Sequence[Sample]) -> None:
    """`samples` must be in ascending order of sample_id."""
    for first, second in pairwise(samples):
        if first.sample_id == second.sample_id:
            raise ValueError(
                f"Sample {first.sample_id!r} is there twice: episodes of the same task need different indices."
            )
