"""Confidence intervals of measured shares, with scipy.stats. Imports no torch.

scipy.stats takes most of a second to import, so each function imports it when it is called.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Proportion:
    """Successes of n trials, with Wilson's 95 % interval. Without trials the mean is 0 and the interval [0, 1]."""

    successes: int
    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences in success, with a 95 % percentile bootstrap interval over the pairs."""

    mean: float
    low: float
    high: float


def proportion(successes: int, n: int) -> Proportion:
    """Wilson's score interval, which stays inside [0, 1]."""
    if n == 0:
        return Proportion(0, 0, 0.0, 0.0, 1.0)
    from scipy.stats import binomtest

    mean = successes / n
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return Proportion(successes, n, mean, min(mean, float(interval.low)), max(mean, float(interval.high)))


def paired_difference(differences: np.ndarray) -> Difference:
    """`differences` [n]: one value in [-1, 1] per pair. Without pairs nothing is known: 0 in [-1, 1]."""
    n = len(differences)
    if n == 0:
        return Difference(0.0, -1.0, 1.0)
    mean = float(differences.mean())
    if n == 1:  # scipy refuses to resample one value
        return Difference(mean, mean, mean)
    from scipy.stats import bootstrap

    draw = np.random.Generator(np.random.Philox(key=0))
    found = bootstrap((differences,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=draw)
    return Difference(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def mcnemar(b: int, c: int) -> float:
    """Two-sided p of McNemar's exact test: each of b + c discordant pairs falls either way with probability 1/2."""
    if b + c == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(b, b + c).pvalue)
