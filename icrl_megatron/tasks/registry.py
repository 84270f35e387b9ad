"""Task sets by name. A new one is one file and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from icrl_megatron.config import ConfigError
from icrl_megatron.tasks.base import Environment, TaskSet
from icrl_megatron.tasks.household import Household
from icrl_megatron.tasks.rulebook import Rulebook
from icrl_megatron.types import Task

_TASK_SETS: dict[str, Callable[[], TaskSet]] = {
    "rulebook_hard": lambda: Rulebook("rulebook_hard"),
    "rulebook_easy": lambda: Rulebook("rulebook_easy"),
    "household": Household,
}


def names() -> tuple[str, ...]:
    return tuple(_TASK_SETS)


def get(name: str) -> TaskSet:
    """The task set of that name. Raises ConfigError, with the nearest names, if there is none."""
    if name not in _TASK_SETS:
        near = difflib.get_close_matches(name, _TASK_SETS, n=3, cutoff=0.4)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"the names are {', '.join(_TASK_SETS)}"
        raise ConfigError(f"unknown task set {name!r}: {remedy}")
    return _TASK_SETS[name]()


def environment(task: Task) -> Environment:
    """Makes a task playable. Raises ConfigError if its source is unknown or its problem is not of that source."""
    return get(task.source).environment(task)
