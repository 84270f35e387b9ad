"""SearchQA: questions answered with searches, scored by exact match or another judge (`agent.judge`).

problem  {"prompt": question, "label": answer, or a JSON list of answers}
reply    <search>words</search> or <answer>the answer</answer>
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

from icrl_megatron.agents.formats import Tags
from icrl_megatron.agents.judge import Judge, ModelJudge, by_rule, exact_match, f1, normalised
from icrl_megatron.agents.search import Search
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_schema import AgentSettings, TaskSource
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.base import TaskSet
from icrl_megatron.tasks.datasets import DataRow, id_range, read_tasks
from icrl_megatron.tasks.grader import Grader, check_limits
from icrl_megatron.tasks.retrieval import LocalRetriever, RemoteRetriever
from icrl_megatron.tasks.servers import TRIES
from icrl_megatron.tasks.tool_use import ToolEnvironment, check_agent
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.connections import Connections
from icrl_megatron.utils.endpoint import EndpointClient
from icrl_megatron.utils.errors import ConfigError

MAX_TURNS = 10
FORMAT = Tags([Search.spec])
PASSAGE_CHARS = 2000
INSTRUCTION = (
    "Answer the question below. Think first; then either search with <search>words</search>, as often as you need, or, "
    "when you know, reply <answer>the answer</answer>, as short as possible."
)
JUDGES = ("exact", "f1", "math", "model")


class RetrievalQA:
    """Questions of `data.train` and `data.heldout`; searches go to `data.corpus` or `data.servers`."""

    def __init__(self, source: TaskSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`."""
        check_agent(source, *JUDGES)
        if source.agent.judge == "math":
            check_limits(source)
        self.name, self._data, self._answer_bytes = source.name, source.data, answer_bytes
        self._agent = source.agent
        if bool(source.data.corpus) == (bool(source.data.servers) or source.served):
            raise ConfigError(
                f"task set {self.name!r} needs one place to search: set exactly one of data.corpus, data.servers and "
                "serve.command of its entry in tasks.sources"
            )
        if source.data.passages < 1:
            raise ConfigError(f"task set {self.name!r}: data.passages={source.data.passages}: must be at least 1")
        self._toolbox: Toolbox | None = None
        self._read: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        if split not in self._read:
            self._read[split] = read_tasks(self.name, split, self._data, _problem)
        return self._read[split]

    def environment(self, task: Task) -> ToolEnvironment:
        try:
            fields = json.loads(task.problem)
            judge, statement = self._judge(fields["prompt"], tuple(fields["golds"])), _statement(fields["prompt"])
            return ToolEnvironment(statement, FORMAT, self.toolbox(), judge, MAX_TURNS, self._agent)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"problem {task.problem[:80]!r} is not one of {self.name!r}: take problems from TaskSet.problems()"
            ) from error

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
    def _client(self) -> EndpointClient:
        at = self._agent.endpoint
        return EndpointClient(at.url, at.model, at.api_key_env, at.timeout_s, Connections(at.concurrency))

    def statement(self, task: Task) -> str:
        return _statement(str(json.loads(task.problem)["prompt"]))

    def check(self) -> None:
        """Builds the index, so that it exists when ranks start. Raises ConfigError on an invalid corpus."""
        self.toolbox()

    def toolbox(self) -> Toolbox:
        if self._toolbox is None:
            data = self._data
            local = LocalRetriever(Path(data.corpus)) if data.corpus else None
            retriever = local or RemoteRetriever(data.servers, data.request_timeout_s, self._answer_bytes)
            # The pool of servers has its own deadlines and retries; this limit only ends what they miss.
            limits = ToolLimits(call_s=TRIES * data.request_timeout_s + 10.0, tries=1)
            self._toolbox = Toolbox([Search(retriever.search, data.passages, PASSAGE_CHARS)], limits)
        return self._toolbox


def _statement(question: str) -> str:
    return f"{INSTRUCTION}\n\nQuestion: {question}"


def SearchQA(source: TaskSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> TaskSet:
    """The task set of a source: task id ranges are questions of AgentGym's SearchQA server, file rows are asked
    locally."""
    if any(id_range(given) is not None for given in (*source.data.train, *source.data.heldout)):
        if source.agent != AgentSettings():
            raise ConfigError(
                f"task set {source.name!r}: AgentGym's server judges the answers to its own questions, so `agent` has "
                "no effect: remove it, or give files of questions in data.train and data.heldout"
            )
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
    return json.dumps({"prompt": row.prompt, "golds": golds, "where": row.where}, ensure_ascii=False)
