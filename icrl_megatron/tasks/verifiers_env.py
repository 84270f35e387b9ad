"""Environments of the package verifiers, unmodified, in local processes (`verifiers_worker.py`).

    data.environment   wordle                 its id, or module:NAME
    data.train         ["0:900"]              rows of its dataset
    reply              any text, which the environment reads; with tools, calls as in Qwen's templates

The environment's rubric scores the finished attempt.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from icrl_megatron.agents.formats import Malformed, ToolCalls
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import VerifiersSource
from icrl_megatron.tasks import verifiers_worker
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure, StepResult, own_problem, sendable, shown
from icrl_megatron.tasks.datasets import id_range
from icrl_megatron.tasks.episode_process import EpisodeProcess
from icrl_megatron.tasks.grader import START_TIMEOUT_S, Worker
from icrl_megatron.tasks.package_environment import Rewarded, calls_of, check_range, offered
from icrl_megatron.types import SPLITS, Split, Task
from icrl_megatron.utils.errors import ConfigError

ROWS = 10_000
"""Rows that a process lists in one answer."""


class VerifiersEnvironment(Rewarded):
    """One row of the dataset. Every failure that the model did not cause raises EnvironmentFailure."""

    _numbers = itertools.count()

    def __init__(self, problem: dict[str, Any], source: VerifiersSource, process: EpisodeProcess) -> None:
        super().__init__(source.reward, source.data.max_turns)
        self._job = {"env": next(self._numbers), **{name: problem[name] for name in ("split", "row", "digest")}}
        self._process, self._malformed = process, ""
        process.episodes += 1

    async def reset(self) -> str:
        self.forget()
        answer = await self._process.ask({"do": "reset", **self._job})
        if answer["done"]:
            raise BadAnswer(f"the environment ended row {self._job['row']} before the first reply")
        return f"{_text(answer)}{offered(answer['tools'])}"

    def parse(self, reply: str) -> str | None:
        self._turns += 1
        found, _ = calls_of(reply)
        self._malformed = found.problem if isinstance(found, Malformed) else ""
        return None if self._malformed else (reply.strip() or None)

    def hint(self) -> str:
        return self._malformed or "The reply is empty."

    async def step(self, action: str) -> StepResult:
        found, text = calls_of(sendable(action))
        calls = found.calls if isinstance(found, ToolCalls) else ()
        made = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
        last = self._turns >= self.max_turns
        job = {"do": "step", "env": self._job["env"], "reply": text, "calls": made, "last": last}
        answer = await self._process.ask(job)
        if answer["done"]:
            self.reward(answer["reward"], answer["metrics"] or {})
        return StepResult(_text(answer), answer["done"])

    def __del__(self) -> None:
        # The Environment protocol has no close, so the episode is released when it is garbage-collected.
        if hasattr(self, "_process"):
            self._process.episodes -= 1
            self._process.forget(self._job["env"])


class VerifiersTasks:
    """The rows of one environment, played in `data.grading_workers` processes."""

    def __init__(self, source: VerifiersSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`. Raises ConfigError on settings that cannot work."""
        self.name, self._source, data = source.name, source, source.data
        if not data.environment:
            raise ConfigError(
                f"task set {self.name!r}: data.environment is empty; name an environment that is installed, e.g. "
                "'tasks.sources[...].data.environment=wordle'"
            )
        check_range(self.name, source.reward)
        self._what, self._answer_bytes = f"the environment {data.environment!r}", answer_bytes
        self._rows: dict[Split, int | None] = {}  # None: rows without end
        self._problems: dict[Split, list[Task]] = {}
        self._processes = [
            EpisodeProcess(self._start, self._what, data.request_timeout_s, answer_bytes)
            for _ in range(data.grading_workers)
        ]

    def problems(self, split: Split) -> Sequence[Task]:
        """The rows of the ranges, without those that repeat an earlier one; training rows also without held-out ones.
        Raises ConfigError if the environment cannot be loaded, or a range goes beyond its rows."""
        if split not in self._problems:
            seen = (
                {json.loads(task.problem)["digest"] for task in self.problems("heldout")} if split == "train" else set()
            )
            try:
                self._problems[split] = self._read(split, seen)
            except EnvironmentFailure as error:
                raise ConfigError(
                    f"tasks.sources[...].data.environment={self._source.data.environment}: {error}; install its "
                    "package or correct its name and data.args (docs/TASKS.md, verifiers)"
                ) from error
        return self._problems[split]

    def environment(self, task: Task) -> VerifiersEnvironment:
        for process in self._processes:
            process.warm()
        with own_problem(self, task):
            process = min(self._processes, key=lambda process: process.episodes)
            return VerifiersEnvironment(json.loads(task.problem), self._source, process)

    def statement(self, task: Task) -> None:
        """Only the environment knows the text, so a problem that is too long is found when it is played."""

    def check(self) -> None:
        """Resets the first row of each split. Raises ConfigError if the environment cannot."""
        for task in [self.problems(split)[0] for split in SPLITS if self.problems(split)]:
            environment = VerifiersEnvironment(json.loads(task.problem), self._source, self._processes[0])
            try:
                asyncio.run(environment.reset())
            except EnvironmentFailure as error:
                raise ConfigError(f"task set {self.name!r}: {task.task_id}: {error}") from error

    def close(self) -> None:
        """Ends the processes; the task set must not be used afterwards."""
        for process in self._processes:
            process.close()

    def _start(self) -> Worker:
        data = self._source.data
        python = data.python or sys.executable
        if data.python and not Path(data.python).is_file():
            raise EnvironmentFailure(f"data.python={data.python} is no interpreter; give the path of a python")
        worker = Worker(
            line_bytes=self._answer_bytes, command=(python, "-P", str(Path(verifiers_worker.__file__).resolve()))
        )
        try:
            found = worker.ask(
                {"do": "load", "environment": data.environment, "args": data.args, "left": []}, START_TIMEOUT_S
            )
        except (TimeoutError, EOFError, ValueError) as error:
            raise EnvironmentFailure(f"{self._what} was not loaded within {START_TIMEOUT_S:g} s") from error
        if "error" in found:
            worker.close()
            raise EnvironmentFailure(f"{self._what} cannot be loaded by {python}: {found['error']}")
        self._rows = {"train": found["train"], "heldout": found["heldout"]}
        return worker

    def _read(self, split: Split, seen: set[str]) -> list[Task]:
        data, tasks = self._source.data, list[Task]()
        process = self._processes[0]
        if not self._rows:
            process.ask_now({"do": "rows", "split": split, "first": 0, "end": 0})
        number, given = self._rows[split], data.of(split)
        if not given and number is None:
            raise ConfigError(
                f"data.{split}: {self._what} has rows without end; give a range, e.g. data.{split}=[0:1000]"
            )
        for text in given or [f"0:{number}"]:
            ids = id_range(text) if text != "0:0" else range(0)
            if ids is None or (number is not None and ids.stop > number):
                has = "endless" if number is None else number
                raise ConfigError(
                    f"data.{split}: {text!r} is not a range of rows of {self._what}, which has {has} {split} rows; "
                    "write first:last+1"
                )
            for first in range(ids.start, ids.stop, ROWS):
                end = min(first + ROWS, ids.stop)
                rows = process.ask_now({"do": "rows", "split": split, "first": first, "end": end})["rows"]
                for row, digest in enumerate(rows, start=first):
                    if digest not in seen:
                        seen.add(digest)
                        problem = {"prompt": digest, "digest": digest, "split": split, "row": row}
                        tasks.append(Task(f"{self.name}/{split}/{text}/{row}", self.name, split, json.dumps(problem)))
        if not tasks:
            raise ConfigError(
                f"data.{split}: {self._what} has no {split} rows that are not held out; divide its rows, e.g. "
                "data.heldout=[0:100] data.train=[100:1000]"
            )
        return tasks


def _text(answer: dict[str, Any]) -> str:
    if not isinstance(answer.get("observation"), str) or not isinstance(answer.get("done"), bool):
        raise BadAnswer(f"the environment's process answered {shown(answer)}")
    return answer["observation"]
