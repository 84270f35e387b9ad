"""SearchQA: questions answered with searches, scored by exact match.

problem  {"prompt": question, "label": answer, or a JSON list of answers}
reply    a call of `search`, or the answer, in the form that `data.format` names
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from pathlib import Path

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.agents.formats import make_format
from icrl_megatron.agents.grammar import named_grammar
from icrl_megatron.agents.search import Search
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.base import TaskSet
from icrl_megatron.tasks.datasets import DataRow, id_range, read_tasks
from icrl_megatron.tasks.grader import check_limits
from icrl_megatron.tasks.retrieval import LocalRetriever, RemoteRetriever
from icrl_megatron.tasks.servers import TRIES
from icrl_megatron.tasks.single_turn import Judge, Verdict, of_answer
from icrl_megatron.tasks.tool_use import ToolEnvironment
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

MAX_TURNS = 10
PASSAGE_CHARS = 2000
INSTRUCTION = "Answer the question below. Think before each search and before the answer. Keep the answer short."
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(answer: str) -> str:
    """Normalizes as SQuAD's evaluation does: lower case, without punctuation and articles, single spaces."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, golds: Sequence[str]) -> bool:
    return bool(normalised(answer)) and normalised(answer) in {normalised(gold) for gold in golds}


def matching(golds: Sequence[str]) -> Judge:
    async def judge(answer: str) -> Verdict:
        return of_answer(exact_match(answer, golds), answer, "answer")

    return judge


class RetrievalQA:
    """Questions of `data.train` and `data.heldout`; searches go to `data.corpus` or `data.servers`."""

    def __init__(self, source: TaskSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """`answer_bytes`: `rollout.max_observation_bytes`."""
        self.name, self._data, self._answer_bytes = source.name, source.data, answer_bytes
        if bool(source.data.corpus) == (bool(source.data.servers) or source.served):
            raise ConfigError(
                f"task set {self.name!r} needs one place to search: set exactly one of data.corpus, data.servers and "
                "serve.command of its entry in tasks.sources"
            )
        check_limits(source)
        self._form = make_format(source.data.format, [Search.spec])
        self._grammar = named_grammar(source.data.grammar)
        self._serve_command = source.serve.command
        self.tool_cache: ToolCache | None = None
        self._toolbox: Toolbox | None = None
        self._read: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        if split not in self._read:
            self._read[split] = read_tasks(self.name, split, self._data, _problem)
        return self._read[split]

    def environment(self, task: Task) -> ToolEnvironment:
        try:
            fields = json.loads(task.problem)
            judge, statement = matching(tuple(fields["golds"])), self._statement(fields["prompt"])
            return ToolEnvironment(statement, self._form, self.toolbox(), judge, MAX_TURNS, self._grammar)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"problem {task.problem[:80]!r} is not one of {self.name!r}: take problems from TaskSet.problems()"
            ) from error

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


def SearchQA(source: TaskSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> TaskSet:
    """The task set of a source: task id ranges are questions of AgentGym's SearchQA server, file rows are asked
    locally."""
    if any(id_range(given) is not None for given in (*source.data.train, *source.data.heldout)):
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
