"""Selects the episodes of a run for a page, one step at a time: memory and page stay small, however long the run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from icrl_megatron.report.page_episodes import outcome
from icrl_megatron.telemetry.dumps import DumpRecord, Rollouts

BINS = 24
"""Histogram bins of the calibration weight, from 0 to w_max."""
SHORTEST = 60
"""Texts are truncated to no fewer tokens than this; then episodes are omitted instead."""

T = TypeVar("T")


@dataclass(frozen=True)
class PageSize:
    """How much of the runs a page contains. The defaults keep any page under 15 MB."""

    episodes: int = 240
    """Maximum per run, spread over its steps."""
    tokens: int = 4000
    """Maximum per text; longer texts are truncated, with a note."""
    total_tokens: int = 300_000
    """Maximum over all texts of the page: texts are truncated further, then episodes omitted, until they fit."""
    steps: int = 120
    """Steps of each run whose rollouts are read, spread over the run: the columns of the weights' plot."""


@dataclass(frozen=True)
class ShownRollouts:
    """The part of a run's rollouts that a page shows."""

    records: list[tuple[int, DumpRecord]]
    """(step, episode) of the shown episodes, in the run's order."""
    limit: int
    """Tokens shown of each text."""
    weights: dict[str, Any]
    """Per step read, over the calibrated tokens: the share in each of `BINS` weight bins, the mean weight, the share
    held back (w < 0.5), the share transferred (w >= 1), and their number."""
    kept: int
    """Dumped episodes in the steps that were read."""
    read: int
    """Steps that were read."""
    dumped: int
    """Steps that have a dump."""


def choose(run: Path, w_max: float, size: PageSize, runs: int) -> ShownRollouts:
    """`runs` is how many runs share the page's total size. Raises ConfigError on a damaged dump."""
    rollouts = Rollouts(run)
    steps = spread(rollouts.steps, size.steps)
    quota = -(-size.episodes // max(1, min(len(steps), size.episodes)))
    showing = set(spread(steps, size.episodes))
    chosen: list[tuple[int, DumpRecord]] = []
    found: dict[str, Any] = {name: [] for name in ("steps", "shares", "mean", "held", "moved", "counts")}
    kept = 0
    for step in steps:
        records = rollouts.read(step)
        kept += len(records)
        weights = [w for record in records for credited in record.credit.values() for w in credited.weights]
        if weights:
            for name, value in _of_weights(step, np.asarray(weights), w_max).items():
                found[name].append(value)
        if step in showing:
            chosen += [(step, record) for record in _of_step(step, records, quota)]
    chosen = spread(chosen, size.episodes)
    chosen, limit = _fitting(chosen, size.tokens, size.total_tokens // max(1, runs))
    return ShownRollouts(chosen, limit, found, kept, len(steps), len(rollouts.steps))


def _of_weights(step: int, weights: np.ndarray, w_max: float) -> dict[str, Any]:
    bins = np.histogram(np.clip(weights, 0.0, w_max), np.linspace(0.0, w_max, BINS + 1))[0]
    parts = {"mean": weights.mean(), "held": (weights < 0.5).mean(), "moved": (weights >= 1.0).mean()}
    shares = (bins / len(weights)).round(4).tolist()
    return {"steps": step, "shares": shares, "counts": len(weights)} | {
        name: round(float(value), 4) for name, value in parts.items()
    }


def _of_step(step: int, records: Sequence[DumpRecord], quota: int) -> list[DumpRecord]:
    """`quota` episodes, taken in turn from each outcome, episodes with a weighted revision first; in dump order."""

    def turn(i: int) -> tuple[bool, bytes]:
        # Ties are broken by hash: a dump is sorted by task, and its first tasks do not represent the whole step.
        lot = hashlib.blake2b(f"{step}/{i}".encode(), digest_size=8).digest()
        return not any(c.weights for c in records[i].credit.values()), lot

    by_outcome: dict[str, list[int]] = {}
    for i in sorted(range(len(records)), key=turn):
        by_outcome.setdefault(outcome(records[i].episode.attempts), []).append(i)
    picked: list[int] = []
    # The page is meant to show rescued episodes: they get two turns, the other outcomes one.
    turns = ("rescued", "failed", "rescued", "hurt", "alone")
    while len(picked) < min(quota, len(records)):
        for kind in turns:
            if by_outcome.get(kind) and len(picked) < quota:
                picked.append(by_outcome[kind].pop(0))
    return [records[i] for i in sorted(picked)]


def _fitting(
    chosen: list[tuple[int, DumpRecord]], longest: int, total: int
) -> tuple[list[tuple[int, DumpRecord]], int]:
    """(episodes, text length limit in tokens) such that the texts have at most `total` tokens together."""
    limit = longest
    while limit > SHORTEST and sum(_cost(record, limit) for _, record in chosen) > total:
        limit = max(SHORTEST, limit // 2)
    cost = sum(_cost(record, limit) for _, record in chosen)
    return spread(chosen, len(chosen) * total // cost) if cost > total else chosen, limit


def _cost(record: DumpRecord, limit: int) -> int:
    """Tokens of an episode on the page; four characters of an observation or a prompt count as one."""
    episode = record.episode
    texts = [len(t.completion.ids) for a in episode.attempts for t in a.turns]
    texts += [len(c.completion.ids) for c in episode.critiques]
    texts += [len(t.observation) // 4 for a in episode.attempts for t in a.turns]
    texts += [len(record.prompt) // 8]
    return sum(min(limit, length) for length in texts)


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` evenly spaced items, or all if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[(i * len(items)) // count] for i in range(count)]
