"""SearchQA: questions answered with searches, scored by exact match or another judge (`agent.judge`).

problem  {"prompt": question, "label": answer, or a JSON list of answers}
reply    a call of `search`, or the answer, in the form that `agent.format` names
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.agents.formats import make_format
from icrl_megatron.agents.judge import Judge, ModelJudge, by_rule, exact_match, f1, normalised
from icrl_megatron.agents.search import Search
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import SearchQASource, check_unused
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.base import TaskSet, own_problem
from icrl_megatron.tasks.datasets import DataRow, id_range, read_tasks
from icrl_megatron.tasks.grader import Grader
from icrl_megatron.tasks.retrieval import LocalRetriever, RemoteRetriever
from icrl_megatron.tasks.servers import TRIES
from icrl_megatron.tasks.tool_use import ToolEnvironment
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.connections import Connections
from icrl_megatron.utils.endpoint import EndpointClient
from icrl_megatron.utils.errors import ConfigError

MAX_TURNS = 30
PASSAGE_CHARS = 2000
OF_FILES = (
    *("agent", "data.corpus", "data.passages", "data.prompt_column", "data.label_column"),
    *("data.grading_workers", "data.grading_timeout_s", "data.numeric_tolerance"),
)
"""Options for questions from files."""
INSTRUCTION = "Answer the question below. Think before each search and before the answer. Keep the answer short."


class RetrievalQA:
    """Questions of `data.train` and `data.heldout`; searches go to `data.corpus` or `data.servers`."""

    def __init__(self, source: SearchQASource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`."""
        self.name, self._data, self._answer_bytes = source.name, source.data, answer_bytes
        if bool(source.data.corpus) == (bool(source.data.servers) or source.served):
            raise ConfigError(
                f"task set {self.name!r} needs one place to search: set exactly one of data.corpus, data.servers and "
                "serve.command of its entry in tasks.sources"
            )
        _check_judge(source)
        if source.data.corpus:
            check_unused(source, ["data.request_timeout_s"], "with data.corpus")
        self._agent, self._form = source.agent, make_format(source.agent.format, [Search.spec])
        self._serve_command = source.serve.command
        self.tool_cache: ToolCache | None = None
        self._toolbox: Toolbox | None = None
        self._read: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        if split not in self._read:
            self._read[split] = read_tasks(self.name, split, self._data, _problem)
        return self._read[split]

    def environment(self, task: Task) -> ToolEnvironment:
        with own_problem(self, task):
            fields = json.loads(task.problem)
            judge, statement = self._judge(fields["prompt"], tuple(fields["golds"])), self._statement(fields["prompt"])
            return ToolEnvironment(statement, self._form, self.toolbox(), judge, MAX_TURNS, self._agent)

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
        return self._statement(str(json.loads(task.problem)["prompt"]))

    def _statement(self, question: str) -> str:
        return f"{INSTRUCTION} {self._form.instructions()}\n\nQuestion: {question}"

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
            search = Search(retriever.search, data.passages, PASSAGE_CHARS, self._version())
            self._toolbox = Toolbox([search], limits, self.tool_cache)
        return self._toolbox

    def _version(self) -> str:
        """Names the collection. Servers that the run starts have other addresses each time, but the same command."""
        if not self._data.corpus:
            return self._serve_command or " ".join(self._data.servers)
        stat = Path(self._data.corpus).stat()
        return f"{Path(self._data.corpus).name} of {stat.st_size} bytes, changed {stat.st_mtime_ns}"


def _check_judge(source: SearchQASource) -> None:
    """Raises ConfigError if the judge lacks a setting, or for an option of another judge."""
    judge, at = source.agent.judge, source.agent.endpoint
    if judge != "math":
        unused = ["data.grading_workers", "data.grading_timeout_s", "data.numeric_tolerance"]
        check_unused(source, unused, f"with agent.judge={judge}")
    if judge != "model":
        check_unused(source, ["agent.endpoint"], f"with agent.judge={judge}")
    elif not (at.url.startswith(("http://", "https://")) and at.model):
        raise ConfigError(
            f"task set {source.name!r}: agent.judge=model needs agent.endpoint.url and .model (url={at.url!r}, "
            f"model={at.model!r}), e.g. {{url: 'http://host:8000/v1', model: NAME}}"
        )


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
    return json.dumps({"prompt": row.prompt, "golds": golds, "where": row.where}, ensure_ascii=False)
