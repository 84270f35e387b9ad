"""What is known about cells of the paper's tables: their data, planned cost, and our numbers. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from icrl_megatron.evaluation.reproduce import differing, evaluation_folder, run_folder
from icrl_megatron.evaluation.result import RESULT
from icrl_megatron.launch.ablate import finished
from icrl_megatron.plan import planner
from icrl_megatron.plan.hardware import GIB
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.loading import SAVED_NAME
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import DataSource
from icrl_megatron.tasks.datasets import id_range
from icrl_megatron.tasks.published import SETS
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import digest
from icrl_recipes.cells import Cell, Figure, Reading


@dataclass(frozen=True)
class DataFile:
    """An entry of a run's data."""

    entry: str
    """As the recipe names it: a file, or a range of task ids."""
    state: str
    """"task ids", "sha256 ...", or "missing: " and how to get it."""


@dataclass(frozen=True)
class CellRun:
    """What a recipe needs."""

    recipe: str
    model: str
    gpus: int
    peak_gib: float
    """Planned peak memory of the H100 that needs most."""
    gpu_hours: float
    """Planned for all training steps of one seed. Evaluations are not part of the plan."""
    data: tuple[DataFile, ...]


@dataclass(frozen=True)
class Ours:
    """Our number of a cell."""

    by_seed: dict[int, float]
    """Seed -> number, for the seeds whose runs are trained and evaluated."""
    begun: bool
    """Whether any of its runs has been started."""
    changed: tuple[str, ...] = ()
    """Settings in which these runs differ from the recipes, as NAME=VALUE."""
    lost: int = 0
    """Episodes that were lost for other reasons than the model, and are in no number."""

    @property
    def value(self) -> float | None:
        """Mean over seeds."""
        return mean(self.by_seed.values()) if self.by_seed else None


@cache
def _recipe(name: str) -> Settings:
    """Cached, so callers must not change it: many cells share a recipe."""
    return settings_module.load(name)


def described(recipe: str, digests: dict[Path, str] | None = None) -> CellRun:
    """Reads the recipe's data files. `digests` keeps the SHA-256 of files for the next call. Raises ConfigError for a
    model of unknown shape."""
    settings = _recipe(recipe)
    plan = planner.plan(settings)
    hours = plan.times.total * settings.steps * plan.layout.all_gpus / 3600
    found = tuple(_data(settings, {} if digests is None else digests))
    return CellRun(recipe, settings.model.path, plan.layout.all_gpus, plan.memory.peak[1] / GIB, hours, found)


def _data(settings: Settings, digests: dict[Path, str]) -> Iterator[DataFile]:
    for source in settings.tasks.sources:
        entries = [*source.data.train, *source.data.heldout] if isinstance(source, DataSource) else []
        for entry in entries:
            if id_range(entry) is not None:
                yield DataFile(entry, f"task ids of the server of {source.name}")
            else:
                yield DataFile(entry, _state(Path(entry), digests))


def _state(file: Path, digests: dict[Path, str]) -> str:
    if file in digests:
        return digests[file]
    try:
        digests[file] = f"sha256 {digest(file)}"
    except FileNotFoundError:
        published = SETS.get(file.stem)
        how = f"`{published.source.get}`, then `icrl data {file.stem}`" if published else "name it in tasks.sources"
        digests[file] = f"missing: {how}"
    except OSError as error:
        digests[file] = f"cannot be read ({error.strerror}): make it readable"
    return digests[file]


class Results:
    """The runs and evaluations in a folder. Each file is read once."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._scores: dict[Path, list[dict[str, Any]]] = {}
        self._changed: dict[Path, tuple[str, ...]] = {}

    def of(self, cell: Cell) -> Ours:
        """Our number. Raises ConfigError if a file is not what this program wrote."""
        values: dict[int, float] = {}
        changed: dict[str, None] = {}
        lost = 0
        for seed in self._seeds(cell.readings[0].recipe):
            read = [self._read(reading, seed) for reading in cell.readings]
            found = [one for one in read if one is not None]
            if len(found) < len(read):
                continue
            values[seed] = mean(value for value, _ in found)
            lost += sum(dropped for _, dropped in found)
            changed |= dict.fromkeys(name for recipe in cell.recipes for name in self._changes(recipe, seed))
        begun = any(self._seeds(recipe) for recipe in cell.recipes)
        return Ours(values, begun, tuple(changed), lost)

    def _seeds(self, recipe: str) -> list[int]:
        endings = (path.name.removeprefix(f"{recipe}_") for path in self.out.glob(f"{recipe}_*") if path.is_dir())
        return sorted(int(ending) for ending in endings if ending.isdecimal())

    def _changes(self, recipe: str, seed: int) -> tuple[str, ...]:
        run = run_folder(self.out, recipe, seed)
        if run not in self._changed:
            found = differing(_recipe(recipe), settings_module.load_saved(run / SAVED_NAME))
            self._changed[run] = tuple(f"{name}={had}" for name, (_, had) in found.items())
        return self._changed[run]

    def _read(self, reading: Reading, seed: int) -> tuple[float, int] | None:
        """The number, and the episodes that were lost; None if the run or its evaluation is not finished, and if this
        evaluation cannot have the number, such as the tokens of critiques without a critique."""
        run = run_folder(self.out, reading.recipe, seed)
        file = evaluation_folder(run, reading.evaluation) / RESULT
        if not (finished(run) and file.is_file()):
            return None
        try:
            if file not in self._scores:
                self._scores[file] = json.loads(file.read_text(encoding="utf-8"))["scores"]
            score = _of_subset(self._scores[file], reading.subset)
            value = None if score is None else _FIGURES[reading.figure](score)
            return None if score is None or value is None else (value, int(score["dropped"]))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(
                f"{file}: not the result of an `icrl eval` of this version ({type(error).__name__}: {error}); move its "
                "folder away, and give the same cells to evaluate again"
            ) from error


def _of_subset(scores: Iterable[dict[str, Any]], subset: str) -> dict[str, Any] | None:
    """The score of the named subset, or of all subsets together; None if there is no such subset."""
    every = list(scores)
    if not subset:
        return every[-1]
    return next((one for one in every if str(one["subset"]).rpartition("/")[2] == subset), None)


def _by_round(number: int) -> Callable[[dict[str, Any]], float | None]:
    return lambda score: 100 * float(score["rounds"][number - 1]["mean"]) if score["rounds"][0]["problems"] else None


def _rescued(score: dict[str, Any]) -> float | None:
    counts = score["transitions"]
    right, wrong = int(counts["wrong_to_right"]), int(counts["stayed_wrong"])
    return 100 * right / (right + wrong) if right + wrong else None


_FIGURES: dict[Figure, Callable[[dict[str, Any]], float | None]] = {
    Figure.SUCCESS: _by_round(1),
    Figure.SECOND: _by_round(2),
    Figure.THIRD: _by_round(3),
    Figure.RESCUED: _rescued,
    Figure.TOKENS: lambda score: float(score["critique_tokens"]) or None,  # 0: no critique was written
}
