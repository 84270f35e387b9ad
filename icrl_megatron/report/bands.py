"""Mean curve of several seeds at common x values, with an interval over the seeds. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from icrl_megatron.telemetry.metrics import HELDOUT

Curve = tuple[Sequence[float], Sequence[float]]
"""x, ascending, and y: lists of the same length."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class Band:
    """A mean over seeds at common x with a 95 % percentile bootstrap interval over them; all lists have equal length.

    With one seed it is the curve itself and the interval has zero width, because the spread is unknown."""

    seeds: int
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def band(curves: Sequence[Curve], points: int = 60) -> Band:
    """The band at up to `points` x values between the latest first and the earliest last x, so that no curve is
    extrapolated. If all curves have the same x, at most `points` of them, these are used. Empty curves are omitted."""
    known = [(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)) for x, y in curves if len(x)]
    if not known:
        return Band(0, (), (), (), ())
    first = known[0][0]
    if len(first) <= points and all(np.array_equal(x, first) for x, _ in known):
        common = first
    else:
        begun, ended = max(x[0] for x, _ in known), min(x[-1] for x, _ in known)
        common = np.linspace(begun, max(begun, ended), points if ended > begun else 1)
    values = np.stack([np.interp(common, x, y) for x, y in known])
    low, mean, high = interval(values)
    places = tuple(np.round(common, 2).tolist())
    return Band(len(known), places, *(tuple(float(f"{value:.6g}") for value in of) for of in (mean, low, high)))


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`values` [seeds, P] -> (low, mean, high), each [P]. All P use the same resamples, so the band is smooth."""
    mean = values.mean(axis=0)
    if len(values) == 1:
        return mean, mean, mean
    picks = np.random.Generator(np.random.Philox(key=0)).integers(0, len(values), size=(_RESAMPLES, len(values)))
    # Weights instead of picks: [resamples, seeds] @ [seeds, P] avoids an array [resamples, seeds, P].
    shares = np.stack([np.bincount(pick, minlength=len(values)) for pick in picks]) / len(values)
    low, high = np.quantile(shares @ values, [0.025, 0.975], axis=0)
    return low, mean, high


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a centered window of a twelfth of the run, truncated at both ends, so that it does not lag."""
    half = max(1, len(values) // 24)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def evaluations(rows: Sequence[Mapping[str, float]], name: str = HELDOUT) -> tuple[list[float], list[float]]:
    """(generated tokens, held-out success) of each evaluation; `name` may be the metric of one task set."""
    found = [(row["tokens/generated_total"], row[name]) for row in rows if name in row]
    return [x for x, _ in found], [y for _, y in found]


def arm_band(seeds: Sequence[Sequence[Mapping[str, float]]], name: str = HELDOUT) -> Band:
    """Held-out success over generated tokens, from the rows of each seed's metrics."""
    return band([evaluations(rows, name) for rows in seeds])
