"""An evaluation as it is asked for, and its result as it is saved and read again."""

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
    """One `icrl eval`, as it was asked for."""

    model: Path
    """A Hugging Face folder, a checkpoint, a folder of them, or a run folder."""
    tasks: tuple[str, ...] = ()
    """Names of task sets; empty: those of the run's settings."""
    on: tuple[str, ...] = (TEST,)
    """Subsets of the held-out problems by name (the files they came from); "test": all of them."""
    rounds: int = 1
    samples: int = 1
    problems: int | None = None
    """At most this many of each task set; None: all."""
    critic: str = ""
    """Empty: the model itself; else a Hugging Face folder or checkpoint, or the address of an endpoint."""
    revise_successes: bool = False
    against: Path | None = None
    """An earlier result to compare with."""
    out: Path | None = None
    overrides: tuple[str, ...] = ()
    overwrite: bool = False
    """Whether `out` may be replaced whatever is there."""

    def critic_address(self) -> str:
        """The address of the critic's endpoint; empty if the critic is none."""
        return self.critic if self.critic.startswith(("http://", "https://")) else ""

    def critic_folder(self) -> Path | None:
        """Where another critic's weights are."""
        return Path(self.critic) if self.critic and not self.critic_address() else None

    def reads(self) -> list[Path]:
        """What the evaluation reads, and so must not replace."""
        return [path for path in (self.model, self.critic_folder(), self.against) if path is not None]


@dataclass(frozen=True)
class Result:
    """What is saved and shown."""

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
    """task id -> hash of its problem: two results are compared only where these agree."""
    comparison: tuple[Comparison, ...] = ()
    against: str = ""
    lost: tuple[str, ...] = field(default=())
    """The first few reasons why episodes were dropped."""
    too_long: int = 0
    """Problems that were left out because they do not fit the context (`tasks.too_long=drop`)."""


def read_result(path: Path) -> Result:
    """What `evaluate` wrote, given the file or its folder; scores are left out. Raises ConfigError on another file."""
    file = path / RESULT if path.is_dir() else path
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        kept: dict[str, Any] = {
            name: saved[name] for name in ("model", "critic", "rounds", "samples", "successes", "subsets", "contents")
        }
        return Result(scores=(), generated_tokens=int(saved["generated_tokens"]), **kept)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--against={path}: not the result of an `icrl eval` ({error}); give its {RESULT}") from error
