"""Environments of the package verifiers, unmodified, in local processes (`verifiers_worker.py`).

    data.environment   wordle                 its id, or module:NAME
    data.train         ["0:900"]              rows of its dataset
    reply              any text, which the environment reads; with tools, calls as in Qwen's templates

The environment's rubric scores the finished attempt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from icrl_megatron.agents.formats import ToolCalls
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import VerifiersSource
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure, StepResult, own_problem, sendable, shown
from icrl_megatron.tasks.episode_process import EpisodeProcesses, ProcessEpisode, started_elsewhere
from icrl_megatron.tasks.grader import Worker
from icrl_megatron.tasks.package_environment import PackageEnvironment, check_range, check_resets
from icrl_megatron.tasks.process_rows import ProcessRows
from icrl_megatron.tasks.reply_forms import call_problem, calls_of, offered
from icrl_megatron.types import SPLITS, Split, Task
from icrl_megatron.utils.errors import ConfigError


class VerifiersEnvironment(PackageEnvironment):
    """One row of the dataset. Every failure that the model did not cause raises EnvironmentFailure."""

    def __init__(self, row: dict[str, Any], source: VerifiersSource, episode: ProcessEpisode) -> None:
        super().__init__(source.reward, source.data.max_turns)
        self._row, self._episode = row, episode

    async def reset(self) -> str:
        self.forget()
        answer = await self._episode.ask("reset", **self._row)
        if answer["done"]:
            raise BadAnswer(f"the environment ended row {self._row['row']} before the first reply")
        return f"{_text(answer)}{offered(answer['tools'])}"

    def problem_of(self, reply: str) -> str:
        return call_problem(reply)

    async def step(self, action: str) -> StepResult:
        found, text = calls_of(sendable(action))
        calls = found.calls if isinstance(found, ToolCalls) else ()
        made = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
        last = self._turns >= self.max_turns
        answer = await self._episode.ask("step", reply=text, calls=made, last=last)
        if answer["done"]:
            self.reward(answer["reward"], answer["metrics"] or {})
        return StepResult(_text(answer), answer["done"])

    def __del__(self) -> None:
        # The Environment protocol has no close, so the episode is released when it is garbage-collected.
        if hasattr(self, "_episode"):
            self._episode.release()


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
        workers, timeout_s = data.grading_workers, data.request_timeout_s
        self._processes = EpisodeProcesses(workers, self._start, self._what, timeout_s, answer_bytes)
        self._rows = ProcessRows(self.name, data, self._what, self._processes.first)

    def problems(self, split: Split) -> Sequence[Task]:
        """As `ProcessRows`. Raises ConfigError also if the environment cannot be loaded."""
        try:
            return self._rows.problems(split)
        except EnvironmentFailure as error:
            raise ConfigError(
                f"tasks.sources[...].data.environment={self._source.data.environment}: {error}; install its "
                "package or correct its name and data.args (docs/TASKS.md, verifiers)"
            ) from error

    def environment(self, task: Task) -> VerifiersEnvironment:
        self._processes.warm()
        with own_problem(self, task):
            row = _row(task)
        return VerifiersEnvironment(row, self._source, self._processes.begin())

    def statement(self, task: Task) -> None:
        """Only the environment knows the text, so a problem that is too long is found when it is played."""

    def check(self) -> None:
        """Resets the first row of each split. Raises ConfigError if the environment cannot."""
        for task in [self.problems(split)[0] for split in SPLITS if self.problems(split)]:
            episode = ProcessEpisode(self._processes.first)  # without starting the others
            environment = VerifiersEnvironment(_row(task), self._source, episode)
            check_resets(f"task set {self.name!r}: {task.task_id}", environment)

    def close(self) -> None:
        """Ends the processes; the task set must not be used afterwards."""
        self._processes.close()

    def _start(self) -> Worker:
        data, module = self._source.data, "icrl_megatron.tasks.verifiers_worker"
        load = {"environment": data.environment, "args": data.args}
        worker, found = started_elsewhere(data.python, module, load, self._what, self._answer_bytes)
        self._rows.counts = {"train": found["train"], "heldout": found["heldout"]}
        return worker


def _row(task: Task) -> dict[str, Any]:
    problem = json.loads(task.problem)
    return {name: problem[name] for name in ("split", "row", "digest")}


def _text(answer: dict[str, Any]) -> str:
    if not isinstance(answer.get("observation"), str) or not isinstance(answer.get("done"), bool):
        raise BadAnswer(f"the environment's process answered {shown(answer)}")
    return answer["observation"]
