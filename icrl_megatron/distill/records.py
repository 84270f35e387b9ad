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
from icrl_megatron.distill.rows import parsed
from icrl_megatron.settings.distill_schema import SystemAgent
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import options
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.types import Task
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import AppendFile

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
_FREE_ENDPOINT = ("url", "api_key_env", "timeout_s", "concurrency", "requests_per_minute")


def identity(settings: Settings) -> dict[str, Any]:
    """What decides the runs: attempts with another identity must not be mixed."""
    distill = {name: value for name, value in asdict(settings.distill).items() if name not in _FREE}
    distill["endpoint"] = {k: v for k, v in distill["endpoint"].items() if k not in _FREE_ENDPOINT}
    distill["agents"] = [_agent(agent) for agent in settings.distill.agents]
    distill["max_observation_bytes"] = settings.rollout.max_observation_bytes
    sources = [dict(_of_source(source)) for source in settings.tasks.sources]
    return {"seed": settings.seed, "distill": distill, "sources": sources}


def _agent(agent: SystemAgent) -> dict[str, Any]:
    found = {name: value for name, value in asdict(agent).items() if name != "url"}
    return {**found, "prompt": _digest(Path(agent.prompt).read_text(encoding="utf-8")) if agent.prompt else ""}


def _of_source(source: TaskSource) -> Iterator[tuple[str, Any]]:
    for name, value in options(source):
        if name == "agent.mcp":
            yield name, [{k: v for k, v in asdict(one).items() if k not in _FREE_OF_MCP} for one in value]
        elif name not in _FREE_OF_SOURCE and not name.startswith("plan."):
            yield name, value


def of_task(task: Task) -> str:
    """Names what a task asks, and what answers it."""
    return _digest(json.dumps([task.source, task.problem]))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


class Records:
    """The finished attempts. Open it with the folder's lock held."""

    def __init__(self, path: Path, identity: Mapping[str, Any], tasks: Iterable[Task]) -> None:
        """Reads the file, and begins it if there is none. A last line that was cut off is removed. Attempts at one of
        these tasks that asked something else at that time are left alone, and counted as `outdated`.

        Raises ConfigError if the file is another one, is of other settings, or cannot be read or written."""
        self.path, self.runs = path, dict[tuple[str, int], Run]()
        self.outdated, self._tasks = 0, {task.task_id: of_task(task) for task in tasks}
        head = json.dumps({_HEAD: dict(identity)})
        with disk_errors(path, "the runs"):
            if path.exists():
                self._read(head)
        self._file = AppendFile(path, "the runs")
        if path.stat().st_size == 0:
            self._file.write(f"{head}\n".encode())

    def add(self, run: Run) -> None:
        self._file.write(f"{json.dumps({'task': self._tasks[run.task_id], **run.to_json()})}\n".encode())
        self.runs[run.task_id, run.attempt] = run

    def close(self) -> None:
        self._file.close()

    def _read(self, head: str) -> None:
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                if number == 1:
                    self._check_head(line, head)
                else:
                    self._add_line(line, number)
        if end < self.path.stat().st_size:
            if end == 0 and not head.encode().startswith(self.path.read_bytes()):
                raise self._other()
            with self.path.open("r+b") as file:
                file.truncate(end)

    def _check_head(self, line: bytes, head: str) -> None:
        try:
            found = json.loads(line)[_HEAD]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._other() from error
        expected = json.loads(head)[_HEAD]
        if found != expected:
            changed = sorted(_changed(found, expected))
            raise ConfigError(
                f"{self.path}: its runs were made with other settings ({', '.join(changed)}): give another --out, or "
                "delete that file to play everything again"
            )

    def _add_line(self, line: bytes, number: int) -> None:
        try:
            fields = parsed(line)
            task = fields.pop("task")
            run = Run.of_json(fields)
            linear(run)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self.path}, line {number}: not a run ({error}); delete that line") from error
        if task == self._tasks.get(run.task_id, task):
            self.runs[run.task_id, run.attempt] = run
        else:
            self.outdated += 1

    def _other(self) -> ConfigError:
        return ConfigError(f"{self.path}: not a file of runs; give another --out")


def _changed(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    """Dotted names of what differs."""
    if found == expected:
        return
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        found, expected = ({str(i): one for i, one in enumerate(side)} for side in (found, expected))
    if not isinstance(expected, dict) or not isinstance(found, dict):
        yield name
        return
    for key in sorted({*found, *expected}):
        yield from _changed(found.get(key), expected.get(key), f"{name}.{key}" if name else key)
