"""The job of the ranks of `icrl eval` and `icrl select`: prepared once and passed to every rank as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from icrl_megatron.evaluation.result import EvalRequest
from icrl_megatron.settings.loading import load_saved, save
from icrl_megatron.settings.schema import Settings
from icrl_megatron.types import Task
from icrl_megatron.utils.files import write_atomically

_PATHS = ("model", "against", "out")
"""Fields of a request that are paths if set."""


@dataclass(frozen=True)
class EvalJob:
    request: EvalRequest
    settings: Settings
    """Includes the requested `rollout.rounds` and the addresses of environment servers."""
    tasks: tuple[Task, ...]
    folder: Path
    """Hugging Face folder of the model."""
    critic: Path | None
    """Hugging Face folder of the critic, if it is another model."""
    out: Path
    logs: Path
    """Folder for the logs of servers and ranks."""
    unusable: Mapping[str, int] = field(default_factory=dict)
    """Reason -> number of held-out rows that are left out; counted before playing."""
    records: Path | None = None
    """`icrl select`: the file to which ranks append the questions that they have measured."""

    def save(self, folder: Path) -> Path:
        """Writes the job into `folder` and returns the file that `load` reads."""
        save(self.settings, folder / "settings.yaml")
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("settings", "tasks")}
        saved = {**values, "request": asdict(self.request), "tasks": [asdict(task) for task in self.tasks]}
        write_atomically(folder / "job.json", [json.dumps(saved, default=str)], "the evaluation's job")
        return folder / "job.json"

    @staticmethod
    def load(path: Path) -> EvalJob:
        saved = json.loads(path.read_text(encoding="utf-8"))
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved["request"].items()}
        given |= {name: Path(given[name]) for name in _PATHS if given[name] is not None}
        return EvalJob(
            request=EvalRequest(**given),
            settings=load_saved(path.with_name("settings.yaml")),
            tasks=tuple(Task(**task) for task in saved["tasks"]),
            folder=Path(saved["folder"]),
            critic=Path(saved["critic"]) if saved["critic"] is not None else None,
            out=Path(saved["out"]),
            logs=Path(saved["logs"]),
            unusable=saved["unusable"],
            records=Path(saved["records"]) if saved["records"] is not None else None,
        )
