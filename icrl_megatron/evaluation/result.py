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
    lost: tuple[str, ...] = field(default=())
    """The first few reasons why episodes were dropped."""
    too_long: int = 0
    """Number of problems dropped because they do not fit the context (`tasks.too_long=drop`)."""
    seconds: float = 0.0
    """Time in which all episodes were played, tools and grading included, the start of engines not."""
    unusable: dict[str, int] = field(default_factory=dict)
    """Reason -> number of held-out rows that `data.unusable=drop` left out."""


def read_result(path: Path) -> Result:
    """The result that `evaluate` wrote, without its scores; `path` is the file or its folder. Raises ConfigError if it
    is not such a file."""
    file = path / RESULT if path.is_dir() else path
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        kept: dict[str, Any] = {
            name: saved[name] for name in ("model", "critic", "rounds", "samples", "successes", "subsets", "contents")
        }
        return Result(scores=(), generated_tokens=int(saved["generated_tokens"]), **kept)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--against={path}: not the result of an `icrl eval` ({error}); give its {RESULT}") from error
