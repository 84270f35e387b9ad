"""`icrl reproduce CELL...`: trains and evaluates what cells of the paper's tables need. Imports no torch.

A run is trained once per recipe and seed, in OUT/RECIPE_SEED, and each of its evaluations is made once, in a folder
within; both serve every cell that reads from them. What is finished is not repeated, and an interrupted run resumes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from icrl_megatron.evaluation.result import RESULT
from icrl_megatron.launch.ablate import finished, run_icrl
from icrl_megatron.run import checks as validate
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.loading import SAVED_NAME
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.values import pasted
from icrl_megatron.utils.errors import ConfigError, did_you_mean
from icrl_recipes.cells import CELLS, Cell, Critic, Evaluation

OURS = ("run_dir", "seed", "name")
"""Settings that this command sets."""
_SIGNIFICANT = re.compile(
    r"steps|max_generated_tokens|model\.|tasks\.|data\.|rollout\.|algo\.|optim\.|warm_start\.|start"
)
_OF_THE_MACHINE = re.compile(r"serve\.|servers|timeout|concurrency|_workers|tool_cache|plan\.")


@dataclass(frozen=True)
class CellPhase:
    """One command: the training of a run, or an evaluation of it."""

    recipe: str
    seed: int
    folder: Path
    """What it writes."""
    words: tuple[str, ...]
    """The command after `icrl`."""
    evaluation: Evaluation | None = None

    @property
    def done(self) -> bool:
        return finished(self.folder) if self.evaluation is None else (self.folder / RESULT).is_file()

    @property
    def name(self) -> str:
        run = f"{self.recipe}_{self.seed}"
        return run if self.evaluation is None else f"{run}_{self.evaluation.name}"


@dataclass(frozen=True)
class Reproduction:
    """What was asked for."""

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    out: Path
    """An absolute path, so that a run resumes in the folder where a job began it."""
    overrides: tuple[str, ...] = ()
    """Settings of every run."""
    critic: str = ""
    """Address of the external critic."""

    def runs(self) -> list[tuple[str, int]]:
        """Recipe and seed of every run, each once."""
        recipes = dict.fromkeys(recipe for cell in self.cells for recipe in cell.recipes)
        return [(recipe, seed) for recipe in recipes for seed in self.seeds]

    def training(self, recipe: str, seed: int) -> CellPhase:
        folder = run_folder(self.out, recipe, seed)
        words = ("train", recipe, *self.overrides, f"run_dir={folder}", f"seed={seed}")
        return CellPhase(recipe, seed, folder, words)

    def evaluations(self, recipe: str, seed: int) -> list[CellPhase]:
        readings = (reading for cell in self.cells for reading in cell.readings if reading.recipe == recipe)
        return [self._evaluated(recipe, seed, one) for one in dict.fromkeys(r.evaluation for r in readings)]

    def _evaluated(self, recipe: str, seed: int, evaluation: Evaluation) -> CellPhase:
        run = run_folder(self.out, recipe, seed)
        folder = evaluation_folder(run, evaluation)
        words = ["eval", str(run), f"--rounds={evaluation.rounds}", f"--samples={evaluation.samples}"]
        words += [f"--on={subset}" for subset in evaluation.on]
        if evaluation.critic is Critic.EXTERNAL:
            words.append(f"--critic={self.critic}")
        elif evaluation.critic is Critic.START:
            words.append(f"--critic={settings_module.load(recipe, self.overrides).model.path}")
        return CellPhase(recipe, seed, folder, (*words, f"--out={folder}", *self.overrides), evaluation)

    def phases(self) -> list[CellPhase]:
        """All commands in an order in which they can run."""
        return [one for run in self.runs() for one in (self.training(*run), *self.evaluations(*run))]


def run_folder(out: Path, recipe: str, seed: int) -> Path:
    return out / f"{recipe}_{seed}"


def evaluation_folder(run: Path, evaluation: Evaluation) -> Path:
    return run / "evaluations" / evaluation.name


def chosen(words: Sequence[str]) -> tuple[Cell, ...]:
    """The cells of these names or patterns (`agentic-icrl-8b-*`), each once. Raises ConfigError for one that names
    none."""
    found: dict[str, Cell] = {}
    for word in words:
        matching = {name: cell for name, cell in CELLS.items() if fnmatchcase(name, word)}
        if not matching:
            hint = did_you_mean(word, CELLS, f"the first is {next(iter(CELLS))}", cutoff=0.5, most=3)
            raise ConfigError(f"{word}: no such cell; {hint} (`icrl reproduce --list` lists all {len(CELLS)})")
        found |= matching
    return tuple(found.values())


def parse(words: Sequence[str], seeds: str, out: Path, critic: str = "") -> Reproduction:
    """`words`: cells, and settings as KEY=VALUE. Raises ConfigError on an unknown cell, invalid seeds, a setting that
    this command sets itself, and an invalid address."""
    overrides = tuple(word for word in words if "=" in word)
    for name in (word.partition("=")[0] for word in overrides):
        if name in OURS:
            raise ConfigError(f"{name}: `icrl reproduce` sets it for each run; use --out, --seeds, or `icrl train`")
    try:
        numbers = tuple(dict.fromkeys(int(seed) for seed in seeds.split(",")))
    except ValueError as error:
        raise ConfigError(f"--seeds={seeds}: write whole numbers with commas, e.g. 0,1,2") from error
    if min(numbers) < 0:
        raise ConfigError(f"--seeds={seeds}: seeds are not negative; write e.g. 0,1,2")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out}: a file, and the runs need a folder; choose another name")
    if critic and not critic.startswith(("http://", "https://")):
        raise ConfigError(f"--critic={critic}: not an address; write e.g. http://host:30000/v1")
    return Reproduction(chosen([w for w in words if "=" not in w]), numbers, out.resolve(), overrides, critic)


def check(asked: Reproduction, installed: bool = True) -> list[Settings]:
    """The settings of each run. Raises ConfigError on what would end a phase at once, before any of them runs: wrong
    settings, data or model of a run, a finished run with other settings, an external critic without an address.
    `installed`: as of `run.checks.validate`."""
    every = []
    for recipe, seed in asked.runs():
        phase = asked.training(recipe, seed)
        settings = settings_module.load(recipe, phase.words[2:])
        if phase.done:
            _check_finished(phase, settings)
        else:
            validate.validate(settings, installed)
        every.append(settings)
    needs = [p for p in asked.phases() if p.evaluation and p.evaluation.critic is Critic.EXTERNAL and not p.done]
    if needs and not asked.critic:
        raise ConfigError(
            f"{needs[0].name} needs an external critic: serve a model of 20B to 32B behind an OpenAI-compatible "
            "endpoint (our sources do not name the paper's), and give its address as --critic http://HOST:PORT/v1"
        )
    return every


def _check_finished(phase: CellPhase, settings: Settings) -> None:
    saved = settings_module.load_saved(phase.folder / SAVED_NAME)
    if differ := differing(settings, saved):
        name, (wanted, had) = next(iter(differ.items()))
        raise ConfigError(
            f"{phase.folder} is a finished run with {name}={had!r}, and now {name} is {wanted!r}; give "
            f"{pasted(name, '' if had is None else str(had))} to use that run, or another folder as --out"
        )


def differing(wanted: Settings, saved: Settings) -> dict[str, tuple[object, object]]:
    """Settings that a result depends on: name -> (value in `wanted`, value in `saved`) where the two differ."""
    changed = settings_module.changed(wanted, saved)
    return {n: both for n, both in changed.items() if _SIGNIFICANT.match(n) and not _OF_THE_MACHINE.search(n)}


def run(asked: Reproduction) -> int:
    """Runs what is missing, one phase after another; returns the exit code of the first that failed."""
    for phase in asked.phases():
        if not phase.done and (code := run_icrl(list(phase.words))):
            return code
    return 0
