"""The episodes of steps that no checkpoint has yet, on disk (`checkpoint.episodes`).

A run that is killed in the middle of a step's rollouts, or before its next checkpoint, plays these steps again.
Episodes that had ended are then replayed from their replies, without generating a token. Each rank has a file for each
step; it is used on the same number of ranks only, because another number divides the tasks otherwise.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import IO

from icrl_megatron.rollout.replay import ReplayLog, log_fields, log_of
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.types import Task
from icrl_megatron.utils.disk import disk_errors

FOLDER = "unfinished_steps"
"""In a run's folder."""
Logs = dict[tuple[str, int], ReplayLog]
"""(task id, episode index) -> replies."""


class Journal:
    """The files of one rank."""

    def __init__(self, run_dir: Path, rank: int, world: int) -> None:
        self._folder, self._rank, self._world = run_dir / FOLDER, rank, world
        self._step, self._purpose = -1, ""
        self._known: dict[tuple[str, int], list[str]] = {}
        """The digests of the episodes of this batch that are in the file."""
        self._file: IO[str] | None = None

    def begin(self, seeds: Seeds) -> Logs:
        """The episodes of this batch that an earlier process has written. Later `add`s belong to the batch."""
        found: Logs = {}
        path = self._folder / f"step_{seeds.step:06d}.rank_{self._rank:05d}_of_{self._world:05d}.jsonl"
        with disk_errors(path, "the episodes of a step"):
            if path.exists():
                found = _read(path, seeds.purpose)
            if self._step != seeds.step:
                self.close()
                self._folder.mkdir(exist_ok=True)
                self._file = path.open("a", encoding="utf-8")
                self._file.write("\n")  # the last line may have been cut off
        self._step, self._purpose = seeds.step, seeds.purpose
        self._known = {key: _digests(log) for key, log in found.items()}
        return found

    def add(self, task: Task, index: int, log: ReplayLog) -> None:
        """Writes an episode that has ended, if it is not in the file."""
        assert self._file is not None
        if self._known.get((task.task_id, index)) == _digests(log):
            return
        line = {"purpose": self._purpose, "task": task.task_id, "index": index, "log": log_fields(log)}
        with disk_errors(self._folder, "an episode of a step"):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def drop_before(self, step: int) -> None:
        """Removes the files of steps that a checkpoint has: this rank's part of them, whatever grid wrote them."""
        if self._step < step:
            self.close()
        for path in self._folder.glob("step_*.rank_*.jsonl"):
            found = re.fullmatch(r"step_(\d+)\.rank_(\d+)_of_\d+\.jsonl", path.name)
            if found is not None and int(found[1]) < step and int(found[2]) % self._world == self._rank:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        self._step = -1
        if self._file is not None:
            self._file.close()
            self._file = None


def _digests(log: ReplayLog) -> list[str]:
    return [reply.prompt for reply in log.replies]


def _read(path: Path, purpose: str) -> Logs:
    """Leaves out lines that were cut off or damaged: these episodes are played again."""
    found: Logs = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["purpose"] == purpose:
                found[str(row["task"]), int(row["index"])] = log_of(row["log"])
        except (ValueError, KeyError, TypeError):
            continue
    return found
