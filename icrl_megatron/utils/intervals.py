"""Confidence intervals of measured shares, with scipy.stats. Imports no torch.

scipy.stats takes most of a second to import, so each function imports it when it is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
_Z = 1.959963984540054
"""Standard deviations of a normal distribution that hold 95 % of it around the mean."""


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
    """Mean of paired differences in success, with a 95 % interval: see the function that made it."""

    mean: float
    low: float
    high: float


def proportion(successes: int, n: int) -> Proportion:
    """Wilson's score interval, which stays inside [0, 1]."""
    mean = successes / n if n else 0.0
    return Proportion(successes, n, mean, *wilson(mean, n))


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a mean of n independent values in [0, 1]; scipy's takes only whole numbers of
    successes. It is wider than needed for values between 0 and 1, whose variance is smaller. Without values it is
    [0, 1]."""
    if n == 0:
        return 0.0, 1.0
    center = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return max(0.0, min(mean, center - half)), min(1.0, max(mean, center + half))


def wilson_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Mean of `first` minus `second`, two arrays [n] of paired values in [0, 1], with Newcombe's 95 % interval, which
    combines the Wilson intervals of the two means and their correlation (Newcombe 1998, method 10, without continuity
    correction). Without pairs nothing is known: 0 in [-1, 1]."""
    n = len(first)
    if n == 0:
        return Difference(0.0, -1.0, 1.0)
    one, other = float(first.mean()), float(second.mean())
    spread = float(first.std() * second.std())
    correlation = float(((first - one) * (second - other)).mean()) / spread if spread > 1e-12 else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    (low_one, high_one), (low_other, high_other) = wilson(one, n), wilson(other, n)
    low = one - other - reach(one - low_one, high_other - other)
    high = one - other + reach(high_one - one, other - low_other)
    return Difference(one - other, max(-1.0, low), min(1.0, high))


def paired_difference(differences: np.ndarray) -> Difference:
    """With a percentile bootstrap over the pairs. `differences` [n]: one value in [-1, 1] per pair. Without pairs
    nothing is known: 0 in [-1, 1]."""
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
