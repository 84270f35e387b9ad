"""The problems that a run trains and evaluates on: read, limited, and checked to fit the context."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icrl_megatron.agents.dialogue import Dialogue
from icrl_megatron.distributed.grid import Grid, gather_objects
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.rollout.checked_environment import CheckedEnvironment
from icrl_megatron.rollout.context_budget import Statement, TooLong, TooLongError, too_long
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.run import start
from icrl_megatron.run.heldout import unusable
from icrl_megatron.settings.loading import model_folder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import EnvironmentFailure, Opening, Readable, sendable
from icrl_megatron.types import SPLITS, Split, Task
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.progress import Progress

RESETS_S = 10.0
"""Maximum time for resetting environments of a task set that is not `Readable`, to see their problems."""
NAMED = 3
"""Maximum number of problems in a message."""

Gather = Callable[[Any], list[Any]]
"""All-gather: an object of this rank -> the objects of all ranks, in rank order."""


@dataclass(frozen=True)
class Problems:
    """Problems by task source, in a fixed order; the same on every rank."""

    train: dict[str, list[Task]]
    heldout: dict[str, list[Task]]
    dropped: int = 0
    """Problems left out because they do not fit the context (`tasks.too_long`)."""

    def evaluated(self, limit: int | None) -> tuple[Task, ...]:
        """The held-out problems of an evaluation: the first `limit` of each source, or all."""
        return tuple(task for tasks in self.heldout.values() for task in tasks[:limit])

    def without(self, lost: Sequence[TooLong]) -> Problems:
        ids = {one.task.task_id for one in lost}

        def kept(found: dict[str, list[Task]]) -> dict[str, list[Task]]:
            return {name: [task for task in tasks if task.task_id not in ids] for name, tasks in found.items()}

        return Problems(kept(self.train), kept(self.heldout), self.dropped + len(ids))


@dataclass(frozen=True)
class ProblemShare:
    """The part of the problems that this process examines, and the all-gather of the results."""

    index: int = 0
    count: int = 1
    gather: Gather = lambda mine: [mine]


def read(settings: Settings, catalogue: registry.Catalogue) -> Problems:
    """The problems of the sources, at most `tasks.limit` training problems of each.

    Raises ConfigError if a source has none.
    """
    train, heldout = ({s.name: catalogue.problems(s.name, split) for s in settings.tasks.sources} for split in SPLITS)
    _require_some(train, "train")
    _require_some(heldout, "heldout")
    return Problems({name: tasks[: settings.tasks.limit] for name, tasks in train.items()}, heldout)


def fitting(
    found: Problems,
    settings: Settings,
    catalogue: registry.Catalogue,
    prompter: Prompter,
    positions: int,
    share: ProblemShare | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Problems:
    """The problems that fit the context of a model with this many positions, checked to be enough for a step.

    Raises ConfigError, which names the problems, if `tasks.too_long` is error or too few are left. Collective over all
    processes of `share`.
    """
    tasks = [task for of in (found.train, found.heldout) for tasks in of.values() for task in tasks]
    prompted = settings.debug.generates()
    lost = examine(tasks, settings, catalogue, prompter, share or ProblemShare()) if prompted else []
    if lost:
        if settings.tasks.too_long == "error":
            raise TooLongError(refusal(lost, len(tasks), settings, positions))
        log(said := left_out(lost, len(tasks), settings))
        found = found.without(lost)
        _require_some(found.train, "train", said)
        _require_some(found.heldout, "heldout", said)
    require_enough(found, settings)
    return found


def examine(
    tasks: Sequence[Task], settings: Settings, catalogue: registry.Catalogue, prompter: Prompter, share: ProblemShare
) -> list[TooLong]:
    """The tasks with a prompt that does not fit, in their order."""
    revised = max(settings.rollout.rounds, settings.eval.rounds) > 1 or settings.eval.control_problems > 0
    mine = tasks[share.index :: share.count]
    lost = too_long(statements(mine, settings, catalogue), prompter, settings.rollout, revised)
    order = {task.task_id: i for i, task in enumerate(tasks)}
    everyones = [one for part in share.gather(lost) for one in part]
    return sorted(everyones, key=lambda one: order[one.task.task_id])


def statements(tasks: Sequence[Task], settings: Settings, catalogue: registry.Catalogue) -> Iterator[Statement]:
    """Each task with its problem as the solver first reads it, as far as it is known without a server.

    Environments of a task set that is not `Readable` are reset for at most RESETS_S seconds, but not if problems that
    are too long are dropped, which must not depend on time. Prompts not seen here are checked when they are played.
    """
    spent: dict[str, float] = {}
    shown: dict[str, tuple[Dialogue, str]] = {}
    for task in tasks:
        task_set = catalogue.get(task.source)
        if isinstance(task_set, Readable):
            said = task_set.statement(task)
            # The same for every problem of a task set, but environments of a user's own may each have their tools.
            if task.source not in shown or catalogue.own_source(task.source) is not None:
                shown[task.source] = _shown(task, settings, catalogue)
            if said is not None:
                yield _statement(task, Opening.of(said), *shown[task.source])
        elif settings.tasks.too_long == "error" and spent.get(task.source, 0.0) < RESETS_S:
            begun = time.monotonic()
            try:
                environment = CheckedEnvironment(task, catalogue.environment, settings.rollout.environment_timeout_s)
                opening = asyncio.run(environment.reset())
            except EnvironmentFailure:  # fails its episodes later, but not the run
                continue
            finally:
                spent[task.source] = spent.get(task.source, 0.0) + time.monotonic() - begun
            yield _statement(task, opening, environment.dialogue, environment.manual)


def _statement(task: Task, opening: Opening, dialogue: Dialogue, manual: str) -> Statement:
    return Statement(task, sendable(opening.text), dialogue, sendable(opening.system), manual)


def _shown(task: Task, settings: Settings, catalogue: registry.Catalogue) -> tuple[Dialogue, str]:
    """What its environment adds to a problem: (dialogue, manual)."""
    try:
        environment = CheckedEnvironment(task, catalogue.environment, settings.rollout.environment_timeout_s)
    except EnvironmentFailure:  # as above
        return Dialogue(), ""
    return environment.dialogue, environment.manual


def refusal(lost: Sequence[TooLong], of: int, settings: Settings, positions: int) -> str:
    """The message for problems that do not fit the context of a model with this many positions, with remedies."""
    first, limit = max(lost, key=lambda one: one.needed), settings.rollout.context_tokens
    if first.needed <= positions:
        remedy = f": raise it to at least {first.needed}, shorten the problems, or set tasks.too_long=drop"
    else:
        remedy = f" (the model has {positions} positions): shorten the problems, or set tasks.too_long=drop"
    return (
        f"{len(lost)} of {of} problems are too long: {named(lost)}. The {first.role} prompt of {first.task.task_id} "
        f"needs {first.needed} tokens, and rollout.context_tokens is {limit}{remedy}"
    )


def left_out(lost: Sequence[TooLong], of: int, settings: Settings) -> str:
    """One line about dropped problems."""
    limit = settings.rollout.context_tokens
    return f"{len(lost)} of {of} problems do not fit rollout.context_tokens={limit} and are left out: {named(lost)}"


def named(lost: Sequence[TooLong]) -> str:
    """The first few, with file and line if they are rows of a file."""
    return ", ".join(_where(one.task) for one in lost[:NAMED]) + (", ..." if len(lost) > NAMED else "")


def require_enough(found: Problems, settings: Settings) -> None:
    """Raises ConfigError if a source has fewer training problems than a step draws."""
    drawn = math.ceil(settings.rollout.tasks_per_step * settings.rollout.oversample)
    for name, tasks in found.train.items():
        if len(tasks) < drawn:
            limit = settings.tasks.limit
            more = "raise tasks.limit" if limit is not None and limit < drawn else "add problems to tasks.sources"
            raise ConfigError(
                f"task set {name!r} has {len(tasks)} training problems, and a step draws {drawn} "
                f"(rollout.tasks_per_step={settings.rollout.tasks_per_step} x rollout.oversample="
                f"{settings.rollout.oversample:g}): {more}, or lower rollout.tasks_per_step"
            )


def chosen(
    settings: Settings, catalogue: registry.Catalogue, prompter: Prompter, folder: Path, grid: Grid, progress: Progress
) -> Problems:
    """The problems of the run that fit the context of the model in `folder`; every rank examines its share. Raises
    ConfigError as `fitting` does."""
    found = read(settings, catalogue)
    for why, rows in (Counter(unusable(settings, "train")) + Counter(unusable(settings, "heldout"))).items():
        progress.log(f"{rows} rows are left out (data.unusable=drop): {why}")
    share = ProblemShare(grid.rank, grid.world, lambda mine: gather_objects(grid, mine))
    positions = ModelShape.read(folder).max_positions
    return fitting(found, settings, catalogue, prompter, positions, share, progress.log)


def dry_run(settings: Settings) -> str:
    """Examines the problems of a run as its ranks do before they load the model; reads only the model's configuration
    and tokenizer. Returns the ranks' message about problems that are left out; raises the same ConfigError."""
    said: list[str] = []
    folder = start.configuration(settings) if settings.start_from else model_folder(settings)
    catalogue = registry.Catalogue(settings.tasks.sources, settings.rollout.max_observation_bytes)
    prompter, positions = Prompter(tokenizer(folder), settings.rollout), ModelShape.read(folder).max_positions
    fitting(read(settings, catalogue), settings, catalogue, prompter, positions, log=said.append)
    return "\n".join(said)


def _require_some(by_source: dict[str, list[Task]], split: Split, why: str = "") -> None:
    for name, tasks in by_source.items():
        if not tasks:
            because = f" left ({why})" if why else ""
            raise ConfigError(f"task set {name!r} has no {split} problems{because}; take it out of tasks.sources")


def _where(task: Task) -> str:
    """The task, with file and line if it is a row of a file."""
    try:
        return f"{task.task_id} ({json.loads(task.problem)['where']})"
    except (ValueError, KeyError, TypeError):
        return task.task_id
