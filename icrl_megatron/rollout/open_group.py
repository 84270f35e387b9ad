"""Groups that were begun and not trained on yet, in an asynchronous run (`rollout.staleness`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icrl_megatron.rollout.replay import ReplayLog, ReplayLogs, from_lines, to_lines
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class OpenGroup:
    """All episodes of one task, to be played together.

    Example: OpenGroup(number=35, task=task, turns=30, version=3)
    """

    number: int
    """Position in the run's order of tasks (`TaskSampler`). It identifies the group, and is a part of its seeds."""
    task: Task
    turns: int
    """Largest number of turns of an attempt."""
    version: int | None = None
    """Version of the weights when its first episode began; None: no episode has begun."""
    logs: dict[int, ReplayLog] = field(default_factory=dict)
    """By episode index: the replies so far."""
    ended: bool = False
    """It was played to its end; only the trainer has its episodes."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint has of the groups of all ranks."""

    begun: int
    """Groups that were begun since the run's first step, trained on or not: the number of the next one."""
    groups: tuple[OpenGroup, ...]


def group_lines(groups: Iterable[OpenGroup]) -> list[str]:
    """A JSON object for each group, for `read`."""
    lines = []
    for group in groups:
        (line,) = to_lines({group.task: group.logs})
        lines.append(json.dumps({"number": group.number, "turns": group.turns, "version": group.version, "log": line}))
    return lines


def begun_line(begun: int) -> str:
    """The line with `Saved.begun`."""
    return json.dumps({"begun": begun})


def read(path: Path) -> Saved | None:
    """Reads the lines of all ranks; None if there is no such file, or it is of a synchronous step. Raises ConfigError
    if it cannot be read."""
    if not path.exists():
        return None
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        counts = [int(row["begun"]) for row in rows if "begun" in row]
        if not counts:
            return None
        return Saved(max(counts), tuple(_group(row) for row in rows if "log" in row))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not written by this version of the program ({error!r}); use the version that began the run, or "
            "set rollout.staleness=0 to continue without the groups in it"
        ) from error


def _group(row: dict[str, Any]) -> OpenGroup:
    logs: ReplayLogs = from_lines([row["log"]])
    ((task, log),) = logs.items()
    return OpenGroup(int(row["number"]), task, int(row["turns"]), row["version"], log)


def share_of(groups: Sequence[OpenGroup], index: int | None, count: int) -> list[OpenGroup]:
    """The groups that one of `count` ranks plays: every rank finds the same split, on any number of ranks."""
    return [] if index is None else [group for group in groups if group.number % count == index]
