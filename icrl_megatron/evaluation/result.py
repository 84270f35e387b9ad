"""The request for an evaluation, and its saved result."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icrl_megatron.evaluation.scores import Comparison, Score, Successes
from icrl_megatron.run.heldout import TEST
from icrl_megatron.utils.errors import ConfigError

RESULT = "eval.json"
PICTURE = "eval.png"


@dataclass(frozen=True)
class EvalRequest:
    """The arguments of one `icrl eval`."""

    model: Path
    """A Hugging Face folder, a checkpoint, a folder of them, or a run folder."""
    tasks: tuple[str, ...] = ()
    """Names of task sets; if empty, those of the run's settings."""
    on: tuple[str, ...] = (TEST,)
    """Subsets of the held-out problems by name (the files they came from); "test" means all of them."""
    rounds: int = 1
    samples: int = 1
    problems: int | None = None
    """Maximum number per task set; None means all."""
    critic: str = ""
    """A Hugging Face folder, a checkpoint, or the address of an endpoint; if empty, the model itself."""
    revise_successes: bool = False
    against: Path | None = None
    """An earlier result to compare with."""
    out: Path | None = None
    overrides: tuple[str, ...] = ()
    overwrite: bool = False
    """Whether `out` may be replaced whatever it contains."""

    def critic_address(self) -> str:
        """The address of the critic's endpoint; empty if the critic is not an endpoint."""
        return self.critic if self.critic.startswith(("http://", "https://")) else ""

    def critic_folder(self) -> Path | None:
        """The folder with the critic's weights, if it is another model."""
        return Path(self.critic) if self.critic and not self.critic_address() else None

    def reads(self) -> list[Path]:
        """The evaluation's inputs, which it must not replace."""
        return [path for path in (self.model, self.critic_folder(), self.against) if path is not None]


@dataclass(frozen=True)
class Costs:
    """What an evaluation cost, over all its own problems."""

    attempts: int
    """Episodes that were not lost."""
    attempt_tokens: float
    read_tokens: float
    """Per attempt; both as in `Score`."""
    seconds: float | None
    measures: dict[str, float]
    """As in `Score`."""


@dataclass(frozen=True)
class Result:
    """The saved and printed result."""

    model: str
    critic: str
    rounds: int
    samples: int
    scores: tuple[Score, ...]
    generated_tokens: int
    successes: Successes
    subsets: dict[str, str]
    """task id -> subset."""
    contents: dict[str, str]
    """task id -> hash of its problem: two results can be compared only if these agree."""
    comparison: tuple[Comparison, ...] = ()
    against: str = ""
    costs_against: Costs | None = None
    """Costs of the other evaluation; None without one, or if its file lacks them."""
    lost: tuple[str, ...] = field(default=())
    """The first few reasons why episodes were dropped."""
    too_long: int = 0
    """Number of problems dropped because they do not fit the context (`tasks.too_long=drop`)."""
    seconds: float | None = None
    """Time in which all episodes were played, tools and grading included, the start of engines not. None: unknown."""
    unusable: dict[str, int] = field(default_factory=dict)
    """Reason -> number of held-out rows that `data.unusable=drop` left out."""

    def costs(self) -> Costs:
        """The costs of this evaluation."""
        every = self.scores[-1]
        return Costs(_attempts(self.successes), every.attempt_tokens, every.read_tokens, self.seconds, every.measures)


def _attempts(successes: Successes) -> int:
    return sum(bool(tries) for of in successes.values() for tries in of)


def read_result(path: Path) -> tuple[Result, Costs | None]:
    """The result that `evaluate` wrote, without its scores, and its costs, if it has them; `path` is the file or its
    folder. Raises ConfigError if it is not such a file."""
    file = path / RESULT if path.is_dir() else path
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        kept: dict[str, Any] = {
            name: saved[name] for name in ("model", "critic", "rounds", "samples", "successes", "subsets", "contents")
        }
        found = Result(scores=(), generated_tokens=int(saved["generated_tokens"]), **kept)
        return found, _costs(saved, found.successes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--against={path}: not the result of an `icrl eval` ({error}); give its {RESULT}") from error


def _costs(saved: dict[str, Any], successes: Successes) -> Costs | None:
    """None for a file of an earlier version, which lacks a part of them. Raises ValueError and TypeError."""
    every = (saved.get("scores") or [{}])[-1]
    if not {"attempt_tokens", "read_tokens", "measures"} <= every.keys():
        return None
    seconds = saved.get("seconds")
    measures = {str(name): float(value) for name, value in every["measures"].items()}
    written, read = float(every["attempt_tokens"]), float(every["read_tokens"])
    # Earlier versions wrote 0 for a system, whose time they did not measure.
    return Costs(_attempts(successes), written, read, float(seconds) if seconds else None, measures)
