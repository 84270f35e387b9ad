"""Headers: what every rank knows of the episodes that other ranks played, without a token or a text.

Credit, balance, packing and metrics are computed from headers, identically on all ranks. They travel as fixed-size
records and a table of strings (`encode`, `decode`): about 300 bytes for an episode of two attempts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from icrl_megatron.types import Attempt, Episode, FloatArray, StopReason, Task

STOP_REASONS: tuple[StopReason, ...] = get_args(StopReason)
_EPISODE = np.dtype([("task", "<i4"), ("index", "<i4"), ("attempts", "<i4"), ("critiques", "<i4")])
_ATTEMPT = np.dtype(
    [
        (name, "<i4")
        for name in ("round", "prompt", "plain", "generated", "observed", "turns", "lost", "cut", "measures")
    ]
    + [("outcome", "<f8"), ("sum", "<f8"), ("rest", "<f8"), ("stop", "u1"), ("success", "?"), ("same", "?")]
)
_CRITIQUE = np.dtype([("round", "<i4"), ("prompt", "<i4"), ("generated", "<i4")])
_MEASURE = np.dtype([("name", "<i4"), ("value", "<f8")])
_TABLES = (_EPISODE, _ATTEMPT, _CRITIQUE, _MEASURE)


@dataclass(frozen=True, slots=True)
class AttemptHeader:
    """One attempt; the counts are tokens where nothing else is said."""

    round: int
    prompt_tokens: int
    plain_prompt_tokens: int
    generated_tokens: int
    observation_tokens: int
    turns: int
    lost_turns: int
    """Turns without an action."""
    cut_texts: int
    """Observations and summaries that were longer than allowed."""
    outcome: float
    logprobs: tuple[float, float]
    """The exact sum of the generated tokens' log-probs, as two numbers: it does not depend on the ranks."""
    stop_reason: StopReason
    success: bool
    same_prompt: bool
    """The prompt is the critique-free prompt."""
    measures: tuple[tuple[str, float], ...] = ()

    @property
    def response_tokens(self) -> int:
        return self.generated_tokens + self.observation_tokens

    @property
    def read_tokens(self) -> int:
        """Tokens of the prompt and of the observations, each once."""
        return self.prompt_tokens + self.observation_tokens

    @staticmethod
    def of(attempt: Attempt) -> AttemptHeader:
        return AttemptHeader(
            round=attempt.round,
            prompt_tokens=len(attempt.prompt_ids),
            plain_prompt_tokens=len(attempt.plain_prompt_ids),
            generated_tokens=attempt.generated_tokens(),
            observation_tokens=attempt.observation_tokens(),
            turns=len(attempt.turns),
            lost_turns=sum(turn.action is None for turn in attempt.turns),
            cut_texts=(attempt.summary_cut_chars > 0) + sum(turn.cut_chars > 0 for turn in attempt.turns),
            outcome=float(attempt.outcome),
            logprobs=_exact_sum([turn.completion.logprobs for turn in attempt.turns]),
            stop_reason=attempt.stop_reason,
            success=attempt.success,
            same_prompt=np.array_equal(attempt.prompt_ids, attempt.plain_prompt_ids),
            measures=attempt.measures,
        )


@dataclass(frozen=True, slots=True)
class CritiqueHeader:
    round: int
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class EpisodeHeader:
    """attempts[0], critiques[0], attempts[1], ... as in `Episode`."""

    task: Task
    index: int
    attempts: tuple[AttemptHeader, ...]
    critiques: tuple[CritiqueHeader, ...]
    rank: int = 0
    """The rank that has the episode."""

    def generated_tokens(self) -> int:
        return sum(a.generated_tokens for a in self.attempts) + sum(c.generated_tokens for c in self.critiques)

    @staticmethod
    def of(episode: Episode, rank: int = 0) -> EpisodeHeader:
        critiques = (CritiqueHeader(c.round, len(c.prompt_ids), len(c.completion.ids)) for c in episode.critiques)
        attempts = tuple(map(AttemptHeader.of, episode.attempts))
        return EpisodeHeader(episode.task, episode.index, attempts, tuple(critiques), rank)


def headers_of(episodes: Iterable[Episode], rank: int = 0) -> tuple[EpisodeHeader, ...]:
    return tuple(EpisodeHeader.of(episode, rank) for episode in episodes)


def encode(headers: Sequence[EpisodeHeader], tasks: Sequence[Task]) -> bytes:
    """`tasks`: those that `decode` is given, too; other tasks are in the table of strings."""
    places = {task: place for place, task in enumerate(tasks)}
    others = [h.task for h in headers if h.task not in places]
    places |= {task: len(tasks) + i for i, task in enumerate(dict.fromkeys(others))}
    attempts = [a for h in headers for a in h.attempts]
    names = {name: i for i, name in enumerate(dict.fromkeys(name for a in attempts for name, _ in a.measures))}
    stops = {reason: i for i, reason in enumerate(STOP_REASONS)}
    rows: tuple[list[tuple[object, ...]], ...] = (
        [(places[h.task], h.index, len(h.attempts), len(h.critiques)) for h in headers],
        [
            (
                *(a.round, a.prompt_tokens, a.plain_prompt_tokens, a.generated_tokens, a.observation_tokens, a.turns),
                *(a.lost_turns, a.cut_texts, len(a.measures), a.outcome, *a.logprobs),
                *(stops[a.stop_reason], a.success, a.same_prompt),
            )
            for a in attempts
        ],
        [(c.round, c.prompt_tokens, c.generated_tokens) for h in headers for c in h.critiques],
        [(names[name], value) for a in attempts for name, value in a.measures],
    )
    strings = {"tasks": [vars(task) for task in dict.fromkeys(others)], "names": list(names), "rows": [*map(len, rows)]}
    text = json.dumps(strings).encode()
    arrays = [np.array(of, dtype=table).tobytes() for of, table in zip(rows, _TABLES, strict=True)]
    return b"".join([np.int64(len(text)).tobytes(), text, *arrays])


def decode(data: bytes, tasks: Sequence[Task], rank: int) -> list[EpisodeHeader]:
    """Inverse of `encode`, on any rank; `rank` is the one that encoded."""
    begin = 8 + int(np.frombuffer(data, dtype=np.int64, count=1)[0])
    strings = json.loads(data[8:begin])
    arrays: list[npt.NDArray[np.void]] = []
    for table, count in zip(_TABLES, strings["rows"], strict=True):
        arrays.append(np.frombuffer(data, dtype=table, count=count, offset=begin))
        begin += count * table.itemsize
    every, names = [*tasks, *(Task(**fields) for fields in strings["tasks"])], strings["names"]
    measured = iter([(names[i], value) for i, value in arrays[3].tolist()])
    attempts = iter([_attempt(row, tuple(islice(measured, row[8]))) for row in arrays[1].tolist()])
    critiques = iter([CritiqueHeader(*row) for row in arrays[2].tolist()])
    return [
        EpisodeHeader(every[task], index, tuple(islice(attempts, a)), tuple(islice(critiques, c)), rank)
        for task, index, a, c in arrays[0].tolist()
    ]


def _attempt(row: tuple[Any, ...], measures: tuple[tuple[str, float], ...]) -> AttemptHeader:
    round, prompt, plain, generated, observed, turns, lost, cut, _, outcome, total, rest, stop, success, same = row
    counts = round, prompt, plain, generated, observed, turns, lost, cut
    return AttemptHeader(*counts, outcome, (total, rest), STOP_REASONS[stop], success, same, measures)


def _exact_sum(parts: Sequence[FloatArray]) -> tuple[float, float]:
    """The correctly rounded sum, and what is missing from it."""
    values = [value for part in parts for value in part.tolist()]
    total = math.fsum(values)
    return (total, math.fsum([*values, -total])) if math.isfinite(total) else (total, 0.0)
