"""The runs of a system on disk: an append-only JSONL file beside the trajectories, so that nothing is played twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icrl_megatron.distill.events import Run
from icrl_megatron.distill.linear import linear
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import options
from icrl_megatron.utils.records import RecordFile

_HEAD = "icrl_distill"
_FREE = ("attempts", "concurrency", "task_timeout_s", "filters")
"""Settings of `distill` that may change between two calls of the command: they do not change what an attempt is."""
_OF_SOURCE = ("name", "data.train", "agent.format", "agent.tools")
"""Options of a source that decide what an attempt is."""
_FREE_ENDPOINT = ("url", "api_key_env", "timeout_s", "concurrency", "requests_per_minute")
_FREE_ROLLOUT = ("tasks_per_step", "episodes_per_task", "concurrency", "oversample", "partial", "environment_timeout_s")


def identity(settings: Settings) -> dict[str, Any]:
    """What decides the runs: attempts with another identity must not be mixed."""
    distill = {name: value for name, value in asdict(settings.distill).items() if name not in _FREE}
    distill["endpoint"] = {k: v for k, v in distill["endpoint"].items() if k not in _FREE_ENDPOINT}
    distill["agents"] = [{k: v for k, v in agent.items() if k != "url"} for agent in distill["agents"]]
    sources = [{k: v for k, v in options(source) if k in _OF_SOURCE} for source in settings.tasks.sources]
    found = {"seed": settings.seed, "distill": distill, "sources": sources}
    if settings.distill.system != "model":
        return found
    rollout = {name: value for name, value in asdict(settings.rollout).items() if name not in _FREE_ROLLOUT}
    return {**found, "model": settings.model.path, "rollout": rollout}


class Records:
    """The finished attempts. Open it with the folder's lock held."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Raises ConfigError as `RecordFile` does."""
        self.runs = dict[tuple[str, int], Run]()
        self._file = RecordFile(path, _HEAD, identity, self._read, "run", "its runs were made with")

    def add(self, run: Run) -> None:
        self._file.write(run.to_json())
        self.runs[run.task_id, run.attempt] = run

    def close(self) -> None:
        self._file.close()

    def _read(self, record: Any) -> None:
        run = Run.of_json(record)
        linear(run)
        self.runs[run.task_id, run.attempt] = run
