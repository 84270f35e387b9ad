"""How sure a measured share is: Wilson intervals, and a bootstrap for paired differences. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""
_RESAMPLES = 4000


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
    """Wilson's score interval, which stays inside [0, 1] and is honest near its ends."""
    if n == 0:
        return Proportion(0, 0, 0.0, 0.0, 1.0)
    mean = successes / n
    scale = 1 + _Z**2 / n
    centre = (mean + _Z**2 / (2 * n)) / scale
    half = _Z / scale * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return Proportion(successes, n, mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def paired_difference(differences: np.ndarray) -> Difference:
    """`differences` [n]: one value in [-1, 1] per pair. Without pairs nothing is known: 0 in [-1, 1]."""
    n = len(differences)
    if n == 0:
        return Difference(0.0, -1.0, 1.0)
    picks = np.random.Generator(np.random.Philox(key=0)).integers(0, n, size=(_RESAMPLES, n))
    low, high = np.quantile(differences[picks].mean(axis=1), [0.025, 0.975])
    return Difference(float(differences.mean()), float(low), float(high))
