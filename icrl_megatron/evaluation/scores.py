"""Scores of evaluated episodes by subset, with intervals, and paired comparisons of two evaluations.

Computed only from which attempts succeeded: no model is needed, so saved evaluations can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from icrl_megatron.algo.headers import EpisodeHeader
from icrl_megatron.tasks.datasets import subset_of
from icrl_megatron.types import DroppedEpisode
from icrl_megatron.utils.intervals import Difference, mcnemar, wilson, wilson_difference

ALL = "all"
Successes = dict[str, list[list[bool]]]
"""task id -> one list per sample, by index: the success of each attempt of the episode; empty if it was lost."""


@dataclass(frozen=True)
class Estimate:
    """A share of successes: a mean over a problem's samples and then over problems, with Wilson's 95 % interval for the
    number of problems. The samples of one problem are not independent, so they do not narrow it."""

    mean: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class Transitions:
    """Counts over all pairs of an attempt and the revision after it."""

    wrong_to_right: int
    right_to_wrong: int
    stayed_wrong: int
    stayed_right: int


@dataclass(frozen=True)
class Score:
    """Scores of one subset, or of all subsets together (`subset` is then "all")."""

    subset: str
    average: Estimate
    """avg@N: critique-free success, the mean over a problem's samples and then over problems."""
    passed: Estimate
    """pass@N: share of problems that any of their samples solved without a critique."""
    rounds: tuple[Estimate, ...]
    """rounds[r]: share of episodes that succeeded in round r or before; rounds[0] is the average."""
    transitions: Transitions
    attempt_tokens: float
    """Mean over all attempts; 0 if there were none."""
    read_tokens: float
    """The same of the tokens that an attempt reads: its prompt and the observations, each once."""
    measures: dict[str, float]
    """Mean over all attempts of what their environment counted: answered, calls, calls_TOOL, ... (docs/AGENTS.md)."""
    critique_tokens: float
    dropped: int
    """Number of episodes lost for reasons other than the model; not counted in any denominator."""


@dataclass(frozen=True)
class Comparison:
    """Critique-free success of one evaluation minus another's, on the same problems with the same seeds."""

    subset: str
    pairs: int
    difference: Difference
    """Mean of the per-problem differences, with an interval from the two Wilson intervals (`wilson_difference`)."""
    only_first: int
    """Number of pairs in which the first sample succeeded and the second failed."""
    only_second: int
    mcnemar_p: float
    """Exact two-sided McNemar test on those two counts."""


def successes(episodes: Sequence[EpisodeHeader], samples: int) -> Successes:
    """`samples` lists per problem with an episode, so that sample i has the same seed in two evaluations."""
    found: Successes = {}
    for episode in episodes:
        of_task = found.setdefault(episode.task.task_id, [[] for _ in range(samples)])
        of_task[episode.index] = [a.success for a in episode.attempts]
    return found


def score(episodes: Sequence[EpisodeHeader], dropped: Sequence[DroppedEpisode], rounds: int) -> tuple[Score, ...]:
    """One score per subset in alphabetical order, and "all" at the end if there are several."""
    subsets = sorted({subset_of(e.task) for e in episodes} | {subset_of(d.task) for d in dropped})
    found = [
        _score(
            subset,
            [e for e in episodes if subset_of(e.task) == subset],
            sum(subset_of(d.task) == subset for d in dropped),
            rounds,
        )
        for subset in subsets
    ]
    return tuple(found if len(found) == 1 else [*found, _score(ALL, episodes, len(dropped), rounds)])


def _score(subset: str, episodes: Sequence[EpisodeHeader], dropped: int, rounds: int) -> Score:
    by_task: Successes = {}
    for e in episodes:
        by_task.setdefault(e.task.task_id, []).append([a.success for a in e.attempts])
    average = [float(np.mean([tries[0] for tries in of])) for of in by_task.values()]
    passed = [float(any(tries[0] for tries in of)) for of in by_task.values()]
    flat = [tries for of in by_task.values() for tries in of]
    by_round = [[float(np.mean([any(t[: r + 1]) for t in of])) for of in by_task.values()] for r in range(rounds)]
    attempts = [attempt for e in episodes for attempt in e.attempts]
    written = [a.generated_tokens for a in attempts]
    read = [a.read_tokens for a in attempts]
    measured = sorted({name for a in attempts for name, _ in a.measures})
    critiques = [c.generated_tokens for e in episodes for c in e.critiques]
    return Score(
        subset=subset,
        average=estimate(average),
        passed=estimate(passed),
        rounds=tuple(map(estimate, by_round)),
        transitions=transitions(flat),
        attempt_tokens=float(np.mean(written)) if written else 0.0,
        read_tokens=float(np.mean(read)) if read else 0.0,
        measures={name: sum(dict(a.measures).get(name, 0.0) for a in attempts) / len(attempts) for name in measured},
        critique_tokens=float(np.mean(critiques)) if critiques else 0.0,
        dropped=dropped,
    )


def transitions(tries: Sequence[Sequence[bool]]) -> Transitions:
    pairs = [pair for one in tries for pair in pairwise(one)]
    count = Counter(pairs)
    return Transitions(count[False, True], count[True, False], count[False, False], count[True, True])


def estimate(values: Sequence[float]) -> Estimate:
    """Of one value in [0, 1] per problem. Without values, mean 0 and interval [0, 1]."""
    mean = float(np.mean(values)) if values else 0.0
    return Estimate(mean, *wilson(mean, len(values)), len(values))


def compare(first: Successes, second: Successes, subset_by_task: Mapping[str, str]) -> tuple[Comparison, ...]:
    """`first` minus `second` by subset and over all, on the samples that both evaluations have and did not lose."""
    names = sorted({subset_by_task[t] for t in first if t in second})
    found = [_compare(name, first, second, {t for t in first if subset_by_task[t] == name}) for name in names]
    return tuple(found if len(found) == 1 else [*found, _compare(ALL, first, second, set(first))])


def _compare(subset: str, first: Successes, second: Successes, tasks: set[str]) -> Comparison:
    both = [(a, b) for t in sorted(tasks) if t in second for a, b in [(first[t], second[t])]]
    outcomes = [[(x[0], y[0]) for x, y in zip(a, b, strict=False) if x and y] for a, b in both]
    means = np.asarray([np.mean(of, axis=0) for of in outcomes if of], dtype=np.float64).reshape(-1, 2)
    flat = [pair for of in outcomes for pair in of]
    only_first, only_second = flat.count((True, False)), flat.count((False, True))
    return Comparison(
        subset=subset,
        pairs=len(flat),
        difference=wilson_difference(means[:, 0], means[:, 1]),
        only_first=only_first,
        only_second=only_second,
        mcnemar_p=mcnemar(only_first, only_second),
    )
