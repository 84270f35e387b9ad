"""The runs of a system on disk: an append-only JSONL file beside the trajectories, so that nothing is played twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icrl_megatron.distill.events import Run
from icrl_megatron.distill.linear import linear
from icrl_megatron.settings.distill_schema import SystemAgent
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import options
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.types import Task
from icrl_megatron.utils import addresses
from icrl_megatron.utils.records import RecordFile
from icrl_megatron.utils.results import folder_digest

_HEAD = "icrl_distill"
_FREE = ("attempts", "concurrency", "task_timeout_s", "filters")
"""Settings of `distill` that may change between two calls of the command: they do not change what an attempt is."""
_FREE_OF_SOURCE = (
    "weight", "data.heldout", "data.request_timeout_s", "data.grading_timeout_s", "data.grading_workers",
    "serve.startup_timeout_s", "agent.page.timeout_s",
    *(f"agent.endpoint.{name}" for name in ("api_key_env", "timeout_s", "concurrency")),
)  # fmt: skip
"""Options of a source, besides `plan`, that may change in the same way."""
_FREE_OF_MCP = ("start_s", "timeout_s")
_PRICES = ("read_price", "written_price")
_FREE_ENDPOINT = ("url", "api_key_env", "timeout_s", "concurrency", "requests_per_minute", *_PRICES)
_FREE_ROLLOUT = ("tasks_per_step", "episodes_per_task", "concurrency", "oversample", "partial", "environment_timeout_s")


def identity(settings: Settings, plays_model: bool) -> dict[str, Any]:
    """What decides the runs: attempts with another identity must not be mixed. `plays_model`: model.path plays, itself
    or on the command's own server."""
    distill = {name: value for name, value in asdict(settings.distill).items() if name not in _FREE}
    distill["endpoint"] = {k: v for k, v in distill["endpoint"].items() if k not in _FREE_ENDPOINT}
    distill["agents"] = [_agent(agent) for agent in settings.distill.agents]
    distill["max_observation_bytes"] = settings.rollout.max_observation_bytes
    sources = [dict(_of_source(source)) for source in settings.tasks.sources]
    found: dict[str, Any] = {"seed": settings.seed, "distill": distill, "sources": sources}
    if plays_model:
        found["model"] = folder_digest(Path(settings.model.path))
    if settings.distill.system != "model":
        return found
    rollout = {name: value for name, value in asdict(settings.rollout).items() if name not in _FREE_ROLLOUT}
    return {**found, "rollout": rollout}


def _agent(agent: SystemAgent) -> dict[str, Any]:
    found = {name: value for name, value in asdict(agent).items() if name not in ("url", *_PRICES)}
    return {**found, "prompt": _digest(Path(agent.prompt).read_text(encoding="utf-8")) if agent.prompt else ""}


def _of_source(source: TaskSource) -> Iterator[tuple[str, Any]]:
    for name, value in options(source):
        if name == "agent.mcp":
            yield name, [_server(asdict(one)) for one in value]
        elif name not in _FREE_OF_SOURCE and not name.startswith("plan."):
            yield name, value


def _server(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An MCP server, without the keys in its address."""
    return {k: v for k, v in fields.items() if k not in _FREE_OF_MCP} | {"url": addresses.shown(fields["url"])}


def of_task(task: Task) -> str:
    """Names what a task asks, and what answers it."""
    return _digest(json.dumps([task.source, task.problem]))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


class Records:
    """The finished attempts. Open it with the folder's lock held."""

    def __init__(self, path: Path, identity: Mapping[str, Any], tasks: Iterable[Task]) -> None:
        """Attempts at one of these tasks that asked something else at that time are left alone, and counted as
        `outdated`. Raises ConfigError as `RecordFile` does."""
        self.runs = dict[tuple[str, int], Run]()
        self.outdated, self._tasks = 0, {task.task_id: of_task(task) for task in tasks}
        self._file = RecordFile(path, _HEAD, identity, self._read, "run", "its runs were made with")

    def add(self, run: Run) -> None:
        self._file.write({"task": self._tasks[run.task_id], **asdict(run)})
        self.runs[run.task_id, run.attempt] = run

    def close(self) -> None:
        self._file.close()

    def _read(self, record: Any) -> None:
        fields = dict(record)
        task = fields.pop("task")
        run = Run.of_json(fields)
        linear(run)
        if task == self._tasks.get(run.task_id, task):
            self.runs[run.task_id, run.attempt] = run
        else:
            self.outdated += 1
