"""The runs of a system on disk: an append-only JSONL file beside the trajectories, so that nothing is played twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icrl_megatron.distill.events import Run
from icrl_megatron.distill.linear import linear
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import options
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import AppendFile

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
        """Reads the file, and begins it if there is none. A last line that was cut off is removed.

        Raises ConfigError if the file is another one, is of other settings, or cannot be read or written."""
        self.path, self.runs = path, dict[tuple[str, int], Run]()
        head = json.dumps({_HEAD: dict(identity)})
        with disk_errors(path, "the runs"):
            if path.exists():
                self._read(head)
        self._file = AppendFile(path, "the runs")
        if path.stat().st_size == 0:
            self._file.write(f"{head}\n".encode())

    def add(self, run: Run) -> None:
        self._file.write(f"{json.dumps(run.to_json())}\n".encode())
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
            changed = sorted(
                name for name in expected if not isinstance(found, dict) or found.get(name) != expected[name]
            )
            raise ConfigError(
                f"{self.path}: its runs were made with other settings ({', '.join(changed)}): give another --out, or "
                "delete that file to play everything again"
            )

    def _add_line(self, line: bytes, number: int) -> None:
        try:
            run = Run.of_json(json.loads(line))
            linear(run)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self.path}, line {number}: not a run ({error}); delete that line") from error
        self.runs[run.task_id, run.attempt] = run

    def _other(self) -> ConfigError:
        return ConfigError(f"{self.path}: not a file of runs; give another --out")
