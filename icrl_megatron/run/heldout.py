"""Selects the problems of an evaluation: held-out problems or subsets of them, and never a training problem."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import DataSource
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.settings.task_sections import Rows, TrainAndHeldout
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.dataset_files import SUFFIXES
from icrl_megatron.tasks.datasets import (
    DataRow,
    check_no_leak,
    content_hash,
    id_range,
    left_out,
    read_rows,
    recognized,
    subset_of,
)
from icrl_megatron.types import SPLITS, Split, Task
from icrl_megatron.utils.errors import ConfigError, did_you_mean, own_entry

TEST = "test"
"""All held-out problems."""


def problems(
    settings: Settings, run: Settings | None, on: Sequence[str], limit: int | None, before: Sequence[Settings] = ()
) -> list[Task]:
    """At most `limit` held-out problems of each of the settings' task sets; `on` names subsets, or "test" for all.
    `run`: the settings of the run that the model comes from; `before`: its earlier settings.

    Raises ConfigError for an unknown subset, and for a problem that is a training problem of these settings or of the
    run, with file and line if the rows are on disk.
    """
    if "train" in on:
        raise ConfigError(
            "--on train: an evaluation on training rows measures memory; leave --on out for the held-out problems, or "
            "name rows that were not trained on with 'tasks.sources.0.data.heldout=[FILE]'"
        )
    found: list[Task] = []
    known: set[str] = set()
    catalogue = registry.Catalogue(settings.tasks.sources, settings.rollout.max_observation_bytes)
    for i, source in enumerate(settings.tasks.sources):
        heldout = catalogue.problems(source.name, "heldout")
        with own_entry(i):
            _check_trained(source, source, heldout)
            for trained in _trained(source, [run] if run else []):
                _check_trained(trained, source, heldout)
            check_earlier_rows(source, before, heldout)
        if not heldout:
            raise ConfigError(f"task set {source.name!r} has no held-out problems to evaluate on")
        known |= {name for task in heldout for name in _names(subset_of(task))}
        chosen = heldout if TEST in on else [task for task in heldout if _names(subset_of(task)) & set(on)]
        found += chosen[:limit]
    for name in set(on) - known - {TEST}:
        hint = did_you_mean(name, known, f"there are {', '.join(sorted(known))}")
        raise ConfigError(f"--on {name}: no such subset of the held-out problems; {hint} ({TEST}: all of them)")
    return found


def check_earlier_rows(source: TaskSource, before: Sequence[Settings], heldout: Sequence[Task]) -> None:
    """Raises ConfigError if a held-out problem is a training problem of settings that the run had `before`. Training
    rows that can no longer be read are not compared."""
    for trained in _trained(source, before):
        try:
            registry.of_source(trained).problems("train")
        except ConfigError:
            continue
        _check_trained(trained, source, heldout)


def _trained(source: TaskSource, runs: Sequence[Settings]) -> list[TaskSource]:
    """Other training rows of this task set in the settings of `runs`, each once."""
    found = {_where(one): one for run in runs for one in run.tasks.sources if one.name == source.name}
    return [one for where, one in found.items() if where != _where(source)]


def _where(source: TaskSource) -> tuple[str, ...]:
    data = _data(source)
    return (*([data.prompt_column, data.shape] if isinstance(data, Rows) else []), *data.train)


def _data(source: TaskSource) -> TrainAndHeldout:
    return source.data if isinstance(source, DataSource) else TrainAndHeldout()


def _check_trained(trained: TaskSource, source: TaskSource, heldout: Sequence[Task]) -> None:
    check_rows(trained, source)
    if not _data(source).heldout or _data(trained).train:
        check_no_leak(registry.of_source(trained).problems("train"), heldout)


def _row_data(source: TaskSource) -> Rows | None:
    """The options of a task set whose entries are files of problems; None if they are something else, such as task ids
    of a server, which SearchQA takes too."""
    data = _data(source)
    if not isinstance(data, Rows) or any(id_range(entry) is not None for entry in (*data.train, *data.heldout)):
        return None
    return data


def check_rows(trained: TaskSource, tested: TaskSource) -> None:
    """Raises ConfigError, naming file and line of both, if a held-out row has the prompt of a training row."""
    of_training = {content_hash(row.content()): row.where for row in _rows(trained, "train")}
    for row in _rows(tested, "heldout") if of_training else ():
        twin = of_training.get(content_hash(row.content()))
        if twin is not None:
            raise ConfigError(
                f"{row.where}: this held-out problem is a training problem too ({twin}), and an evaluation on "
                f"training rows measures memory; delete it from one of the files, or give other held-out rows of "
                f"{tested.name} with 'tasks.sources[...].data.heldout=[FILE]'"
            )


def _rows(source: TaskSource, split: Split) -> Iterable[DataRow]:
    data = _row_data(source)
    if data is not None:
        for name in data.of(split):
            if _has_rows(Path(name)):
                yield from read_rows(name, data, split)


def unusable(settings: Settings, split: Split) -> dict[str, int]:
    """Reason -> number of the rows of a split that `data.unusable=drop` and `data.duplicates=drop` leave out."""
    every = filter(None, map(_row_data, settings.tasks.sources))
    return dict(sum((left_out(split, one) for one in every), Counter[str]()))


def say_columns(index: int, source: TaskSource) -> None:
    """Prints which columns of the rows were recognized. Ranks do not repeat what their launcher printed."""
    data = _row_data(source)
    if data is None or "RANK" in os.environ:
        return
    for split in SPLITS:
        prefix = "heldout_" if split == "heldout" else ""
        for line in recognized(split, data):
            option = f"tasks.sources.{index}.data.{prefix}"
            print(f"note: {line}; {option}prompt_column and {option}label_column change that", file=sys.stderr)


def _has_rows(path: Path) -> bool:
    """Whether `path` has rows: task sets also accept other data, such as task numbers of a server, or other folders."""
    return path.suffix in SUFFIXES or (path.is_dir() and any(file.suffix in SUFFIXES for file in path.iterdir()))


def _names(subset: str) -> set[str]:
    """Names of a subset: its full name, e.g. math/aime24, and its last part."""
    return {subset, subset.rsplit("/", 1)[-1]}
