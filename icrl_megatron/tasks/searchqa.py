"""SearchQA: questions answered with searches, scored by exact match or another judge (`agent.judge`).

problem  {"prompt": question, "label": answer, or a JSON list of answers}
reply    a call of `search`, or the answer, in the form that `agent.format` names
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial

from icrl_megatron.agents.judge import (
    Judge,
    ModelJudge,
    by_rule,
    check_endpoint,
    exact_match,
    f1,
    judge_client,
    normalised,
)
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import SearchQASource, check_unused
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.base import Opening, TaskSet, own_problem
from icrl_megatron.tasks.datasets import DataRow, id_range, read_tasks
from icrl_megatron.tasks.grader import Grader
from icrl_megatron.tasks.program_labels import program_problem
from icrl_megatron.tasks.programs import ANSWER, ProgramTests
from icrl_megatron.tasks.tool_use import MAX_TURNS, CheckedAnswer, ToolEnvironment
from icrl_megatron.tasks.tools import OffersTools, SourceTools
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.endpoint import EndpointClient
from icrl_megatron.utils.errors import ConfigError

OF_FILES = (
    *("agent", "data.corpus", "data.passages", "data.prompt_column", "data.label_column"),
    *("data.shape", "data.unusable", "data.system"),
    *("data.grading_workers", "data.grading_timeout_s", "data.numeric_tolerance", "data.program_memory_mib"),
)
"""Options for questions from files."""
INSTRUCTION = "Answer the question below. Think before each search and before the answer. Keep the answer short."


class RetrievalQA(OffersTools):
    """Questions of `data.train` and `data.heldout`; searches go to `data.corpus` or `data.servers`."""

    def __init__(self, source: SearchQASource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`."""
        _check_judge(source)
        self.name, self._data, self._agent = source.name, source.data, source.agent
        self.tools = SourceTools(source, source.agent.tools or ["search"], answer_bytes)
        self._read: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        if split not in self._read:
            self._read[split] = read_tasks(self.name, split, self._data, self._problem)
        return self._read[split]

    def environment(self, task: Task) -> ToolEnvironment:
        form, toolbox = self.tools.form, self.tools.toolbox
        with own_problem(self, task):
            fields = json.loads(task.problem)
            asked = Opening(fields["prompt"], fields.get("system", ""))
            statement = self._statement(asked)
            if self._agent.judge == "tests":
                check = self._tests.of(fields)
                return CheckedAnswer(statement, self.tools, check, MAX_TURNS, self._agent, whole=True)
            judge = self._judge(asked.joined(), tuple(fields["golds"]))
            return ToolEnvironment(statement, form, toolbox, judge, MAX_TURNS, self._agent)

    def _judge(self, question: str, golds: tuple[str, ...]) -> Judge:
        match self._agent.judge:
            case "f1":
                return by_rule(partial(f1, golds=golds))
            case "math":
                return partial(self._equal, golds=golds)
            case "model":
                return ModelJudge(self._client, question, golds)
        return by_rule(partial(exact_match, golds=golds))

    async def _equal(self, answer: str, golds: tuple[str, ...]) -> float:
        for gold in golds:
            if await self._grader.correct(answer, gold):
                return 1.0
        return 0.0

    @cached_property
    def _grader(self) -> Grader:
        return Grader(self._data.grading_workers, self._data.grading_timeout_s, self._data.numeric_tolerance)

    @cached_property
    def _tests(self) -> ProgramTests:
        return ProgramTests(self._data)

    @cached_property
    def _client(self) -> EndpointClient:
        return judge_client(self._agent.endpoint)

    def statement(self, task: Task) -> str | Opening:
        fields = json.loads(task.problem)
        return self._statement(Opening(str(fields["prompt"]), fields.get("system", "")))

    def _statement(self, asked: Opening) -> str | Opening:
        text = f"{INSTRUCTION} {self.tools.form.instructions()}\n\nQuestion: {asked.text}"
        if self._agent.judge == "tests":
            text = f"{asked.text}\n\n{self.tools.form.instructions()} {ANSWER}"
        return Opening.plain(text, asked.system)

    @property
    def _problem(self) -> Callable[[DataRow], str]:
        return program_problem if self._agent.judge == "tests" else _problem

    def check(self) -> None:
        """Builds the index, so that it exists when ranks start. Raises ConfigError on an invalid corpus, and for a tool
        or a judge that does not work."""
        self.tools.check()
        if self._agent.judge == "tests":
            self._tests.sandbox.check()


def _check_judge(source: SearchQASource) -> None:
    """Raises ConfigError if the judge lacks a setting, or for an option of another judge."""
    judge, python = source.agent.judge, "python" in source.agent.tools
    if judge not in ("math", "tests"):
        limits = [] if python else ["data.grading_workers", "data.grading_timeout_s"]
        check_unused(source, [*limits, "data.numeric_tolerance"], f"with agent.judge={judge}")
    if judge != "tests" and not python:
        check_unused(source, ["data.program_memory_mib"], f"with agent.judge={judge} and without python in agent.tools")
    if judge != "model":
        check_unused(source, ["agent.endpoint"], f"with agent.judge={judge}")
        return
    check_endpoint(source.agent.endpoint, "agent.endpoint", f"task set {source.name!r}: agent.judge=model")


def SearchQA(source: SearchQASource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> TaskSet:
    """The task set of a source: task id ranges are questions of AgentGym's SearchQA server, file rows are asked
    locally."""
    if any(id_range(given) is not None for given in (*source.data.train, *source.data.heldout)):
        check_unused(source, OF_FILES, "with ranges of task ids, whose answers AgentGym's server judges")
        return AgentGym(source, answer_bytes)
    return RetrievalQA(source, answer_bytes)


def _problem(row: DataRow) -> str:
    try:
        listed = json.loads(row.label) if row.label.startswith("[") else [row.label]
    except ValueError:
        listed = [row.label]
    golds = [str(gold) for gold in listed]
    if not any(normalised(gold) for gold in golds):
        raise ConfigError(f"{row.where}: the label {row.label[:80]!r} is empty once normalized; fix or delete the row")
    return row.problem(golds=golds)
