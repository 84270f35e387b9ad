"""Problems that are rows of a data set which only a worker process can read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from icrl_megatron.settings.task_sections import TrainAndHeldout
from icrl_megatron.tasks.datasets import id_range
from icrl_megatron.tasks.episode_process import EpisodeProcess
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

ROWS = 10_000
"""Rows that a process lists in one answer."""


class ProcessRows:
    """The rows of the ranges of `data.train` and `data.heldout`, without those that repeat an earlier one; training
    rows also without held-out ones. A problem is {"split", "row", "digest"}; the digest tells a row from others."""

    def __init__(self, name: str, data: TrainAndHeldout, what: str, process: EpisodeProcess) -> None:
        """`what` names the data set in messages. The process answers {"do": "rows", "split", "first", "end"} with the
        digests of these rows."""
        self.counts: Mapping[Split, int | None] = {}
        """Rows of each split, which must be set when the process starts. None: without end."""
        self.process = process
        self._name, self._data, self._what = name, data, what
        self._problems: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        """Raises EnvironmentFailure if the process fails, ConfigError if a range goes beyond the rows or nothing is
        left."""
        if split not in self._problems:
            heldout = self.problems("heldout") if split == "train" else ()
            self._problems[split] = self._read(split, {json.loads(task.problem)["digest"] for task in heldout})
        return self._problems[split]

    def _read(self, split: Split, seen: set[str]) -> list[Task]:
        tasks = list[Task]()
        for text, ids in self._ranges(split):
            for first in range(ids.start, ids.stop, ROWS):
                end = min(first + ROWS, ids.stop)
                rows = self.process.ask_now({"do": "rows", "split": split, "first": first, "end": end})["rows"]
                for row, digest in enumerate(rows, start=first):
                    if digest not in seen:
                        seen.add(digest)
                        problem = {"prompt": digest, "digest": digest, "split": split, "row": row}
                        tasks.append(Task(f"{self._name}/{split}/{text}/{row}", self._name, split, json.dumps(problem)))
        if not tasks:
            raise ConfigError(
                f"data.{split}: {self._what} has no {split} rows that are not held out; divide its rows, e.g. "
                "data.heldout=[0:100] data.train=[100:1000]"
            )
        return tasks

    def _ranges(self, split: Split) -> list[tuple[str, range]]:
        """The entries of the settings with their rows; without entries, all rows."""
        if not self.counts:
            self.process.ask_now({"do": "rows", "split": split, "first": 0, "end": 0})  # starts it
        number, given, found = self.counts[split], self._data.of(split), []
        if not given and number is None:
            raise ConfigError(
                f"data.{split}: {self._what} has rows without end; give a range, e.g. data.{split}=[0:1000]"
            )
        for text in given or [f"0:{number}"]:
            ids = id_range(text) if text != "0:0" else range(0)
            if ids is None or (number is not None and ids.stop > number):
                has = "endless" if number is None else number
                raise ConfigError(
                    f"data.{split}: {text!r} is not a range of rows of {self._what}, which has {has} {split} rows; "
                    "write first:last+1"
                )
            found.append((text, ids))
        return found
