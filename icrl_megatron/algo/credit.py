"""Credit: rewards -> advantages, inside groups that share a baseline (paper Eq. 5), and the two published presets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from icrl_megatron.algo.samples import to_samples
from icrl_megatron.settings.schema import AlgoSettings, GroupFilter, Overlong
from icrl_megatron.types import Episode, Sample

STD_FLOOR = 1e-6
"""Added to a group's deviation (Eq. 5)."""
NO_SPREAD = 1e-8
"""Rewards closer than this are equal: differences of outcomes carry rounding, which must not become a signal."""


@dataclass(frozen=True)
class CreditReport:
    """The samples of a step with their advantages, and what became of their groups."""

    samples: tuple[Sample, ...]
    """Sorted by sample_id. Samples with advantage 0 are among them: they count in the loss normaliser (the mean of
    `sequence_mean` is over the whole batch) and in the KL and entropy terms."""
    groups: int
    """All groups, the dropped ones included."""
    flat_groups: int
    """Kept groups whose members all have advantage 0."""
    dropped_groups: int
    """Groups taken out by `algo.group_filter`; their samples are gone, also from the normaliser."""
    dropped_samples: int
    """Of those groups, and revisions beyond `algo.revisions_per_task`."""
    overlong_penalty: float | None = None
    """Mean of what `algo.overlong` took off the samples' rewards; None where it is off or there is no sample."""

    @property
    def has_signal(self) -> bool:
        """Whether any token of the batch would be pushed up or down; without it the batch should be drawn again."""
        return any(s.advantage != 0.0 and any(s.loss_mask) for s in self.samples)


def credit(episodes: Iterable[Episode], settings: AlgoSettings, train_critic: bool) -> CreditReport:
    """Samples of all episodes of a step with normalised advantages. The order of the episodes does not matter.

    Raises ConfigError on an outcome outside [0, 1], and ValueError on two episodes of a task with the same index.
    """
    groups: dict[str, list[Sample]] = defaultdict(list)
    samples = [sample for episode in episodes for sample in to_samples(episode, settings, train_critic)]
    surplus = _surplus_revisions(samples, settings.revisions_per_task)
    for sample in samples:
        if sample.sample_id not in surplus:
            groups[sample.group].append(sample)

    kept: list[Sample] = []
    penalties: list[float] = []
    flat = dropped = 0
    dropped_samples = len(surplus)
    for _, members in sorted(groups.items()):
        members.sort(key=lambda s: s.sample_id)
        if settings.group_filter.enabled and _hopeless(members, settings.group_filter):
            dropped += 1
            dropped_samples += len(members)
            continue
        off = [overlong_penalty(m.loss_tokens(), settings.overlong) for m in members]
        rewards = [m.reward - penalty for m, penalty in zip(members, off, strict=True)]
        values = advantages(rewards, settings.normalise_std, settings.pseudo_positive)
        penalties += off
        flat += not any(values)
        kept += [replace(m, advantage=a) for m, a in zip(members, values, strict=True)]

    kept.sort(key=lambda s: s.sample_id)
    _check_unique(kept)
    penalized = settings.overlong.max_tokens is not None and penalties
    penalty = sum(penalties) / len(penalties) if penalized else None
    return CreditReport(tuple(kept), len(groups), flat, dropped, dropped_samples, penalty)


def advantages(rewards: Sequence[float], normalise_std: bool = True, pseudo_positive: bool = False) -> list[float]:
    """Eq. 5: A_i = (r_i - mean(r)) / (std(r) + 1e-6) over one group; not `normalise_std` takes off the mean only.

    The deviation is the sample deviation (n - 1): our choice. `pseudo_positive` adds one reward of 1 to what mean and
    deviation are taken over, so that a group which failed throughout is pushed down. Groups of one, and groups
    without spread (the pseudo reward included), give 0.
    """
    baseline = np.asarray([*rewards, 1.0] if pseudo_positive else rewards, dtype=np.float64)
    if len(rewards) < 2 or np.ptp(baseline) < NO_SPREAD:
        return [0.0] * len(rewards)
    centred = np.asarray(rewards, dtype=np.float64) - baseline.mean()
    if normalise_std:
        centred /= baseline.std(ddof=1) + STD_FLOOR
    return [float(a) for a in centred]


def overlong_penalty(tokens: int, overlong: Overlong) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, Eq. 13), what is taken off a reward: 0 up to `max_tokens -
    buffer_tokens` generated tokens, then linear up to `factor` at `max_tokens`, and `factor` beyond."""
    if overlong.max_tokens is None:
        return 0.0
    excess = tokens - (overlong.max_tokens - overlong.buffer_tokens)
    return overlong.factor * min(1.0, max(0.0, excess / overlong.buffer_tokens))


def _surplus_revisions(samples: Sequence[Sample], limit: int | None) -> set[str]:
    """Ids of the revisions of each task beyond its `limit` best; the first by its id among equals."""
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples if limit is not None else ():
        if sample.role == "revision":
            by_task[sample.sample_id.rsplit("#", 1)[0]].append(sample)
    ranked = (sorted(of, key=lambda s: (-s.reward, s.sample_id)) for of in by_task.values())
    return {sample.sample_id for of in ranked for sample in of[limit:]}


def _hopeless(members: Sequence[Sample], group_filter: GroupFilter) -> bool:
    """True for a critique or revision group without any success, or whose mean reward is too low."""
    if any(m.role == "attempt" for m in members):
        return False
    rewards = [m.reward for m in members]
    return max(rewards) < 1.0 or float(np.mean(rewards)) < group_filter.min_mean_reward


def _check_unique(samples: Sequence[Sample]) -> None:
    for first, second in pairwise(samples):
        if first.sample_id == second.sample_id:
            raise ValueError(
                f"Sample {first.sample_id!r} came twice in one step: episodes of the same task need different indices."
            )
