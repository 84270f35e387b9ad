"""Weights problems by recent success: problems that always or never succeed are drawn less often."""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icrl_megatron.algo.headers import EpisodeHeader
from icrl_megatron.tasks.datasets import asked, content_hash
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import AppendFile, write_atomically

HISTORY = "task_success.jsonl"
"""File in the run folder. One line per step: for each played problem, the share of first attempts that succeeded."""
RECENT = 3
"""Number of recent visits that count."""


class Curriculum:
    """Weights of problems by their recent critique-free success. The same on every rank, and after a resume.

    An unseen problem has weight 1. One with recent success p has weight floor + (1 - floor) * 4p(1 - p), which follows
    the spread of a group's rewards, the signal that a step learns from.
    """

    def __init__(self, floor: float) -> None:
        self._floor = floor
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    def weight(self, task_id: str) -> float:
        visits = self._recent.get(task_id)
        if not visits:
            return 1.0
        p = sum(visits) / len(visits)
        return self._floor + (1.0 - self._floor) * 4.0 * p * (1.0 - p)

    def observe(self, shares: dict[str, float]) -> None:
        """Adds the results of one step, from `success_shares`."""
        for task_id, share in shares.items():
            self._recent[task_id].append(share)

    def draw(self, problems: Sequence[Task], count: int, rng: random.Random) -> list[Task]:
        """`count` weighted draws without replacement. If there are fewer problems than `count`, whole copies of the
        list come first."""
        rounds, rest = divmod(count, len(problems))
        # Exponential clocks: the `rest` smallest times are a weighted sample without replacement.
        times = sorted((rng.expovariate(max(self.weight(t.task_id), 1e-9)), i) for i, t in enumerate(problems))
        return [*problems] * rounds + [problems[i] for _, i in times[:rest]]


def success_shares(episodes: Iterable[EpisodeHeader]) -> dict[str, float]:
    """Task id -> share of its first attempts that succeeded."""
    seen: dict[str, list[bool]] = defaultdict(list)
    for episode in episodes:
        seen[episode.task.task_id].append(episode.attempts[0].success)
    return {task_id: sum(of) / len(of) for task_id, of in sorted(seen.items())}


def append_history(run_dir: Path, step: int, shares: dict[str, float], tasks: Iterable[Task] = ()) -> None:
    """Appends the results of a step, with a hash of each task's prompt, because a task id names another problem if its
    file changes."""
    asks = {task.task_id: content_hash(asked(task)) for task in tasks}
    file = AppendFile(run_dir / HISTORY, "the successes of the step")
    file.write(f"{json.dumps({'step': step, 'success': shares, 'asks': asks})}\n".encode())
    file.close()


def read_history(run_dir: Path, until: int, tasks: Iterable[Task] = ()) -> list[dict[str, float]]:
    """The results of the steps up to `until`, in order, without problems whose prompt differs from that of today's
    `tasks`.

    Raises ConfigError on a damaged file.
    """
    rows, today = _rows(run_dir, until), {task.task_id: task for task in tasks}

    def same(task_id: str, asks: dict[str, str]) -> bool:
        task, before = today.get(task_id), asks.get(task_id)
        return task is None or before is None or before == content_hash(asked(task))

    return [{i: share for i, share in row.success.items() if same(i, row.asks)} for row in rows]


def cut_history(run_dir: Path, until: int) -> None:
    """Removes the lines after the checkpoint from which a run resumes. One rank calls it, before any rank appends."""
    rows = (json.dumps(vars(row)) for row in _rows(run_dir, until))
    write_atomically(run_dir / HISTORY, rows, "the successes of the steps")


@dataclass(frozen=True)
class _Row:
    """One line of the history."""

    step: int
    success: dict[str, float]
    """Task id -> share."""
    asks: dict[str, str]
    """Task id -> hash of its prompt."""


def _rows(run_dir: Path, until: int) -> list[_Row]:
    """The lines of the file up to a step, in order; steps without a curriculum have none."""
    found: dict[int, _Row] = {}
    path = run_dir / HISTORY
    lines = (
        path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    )  # the last line may be incomplete
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            success = {str(k): float(v) for k, v in row["success"].items()}
            found[int(row["step"])] = _Row(int(row["step"]), success, dict(row.get("asks", {})))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path}, line {number} is damaged: delete that line, or start in another run_dir"
            ) from error
    return [found[step] for step in sorted(found) if step <= until]
