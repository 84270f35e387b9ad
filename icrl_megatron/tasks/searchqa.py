"""SearchQA: questions answered with searches, scored by exact match.

problem  {"prompt": question, "label": answer, or a JSON list of answers}
reply    <search>words</search> or <answer>the answer</answer>
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from pathlib import Path

from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.agentgym_dialects import action_of
from icrl_megatron.tasks.base import StepResult, TaskSet
from icrl_megatron.tasks.datasets import DataRow, id_range, read_tasks
from icrl_megatron.tasks.retrieval import LocalRetriever, RemoteRetriever, Retriever
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

MAX_TURNS = 10
PASSAGE_CHARS = 2000
INSTRUCTION = (
    "Answer the question below. Think first; then either search with <search>words</search>, as often as you need, or, "
    "when you know, reply <answer>the answer</answer>, as short as possible."
)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(answer: str) -> str:
    """Normalizes as SQuAD's evaluation does: lower case, without punctuation and articles, single spaces."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, golds: Sequence[str]) -> bool:
    return bool(normalised(answer)) and normalised(answer) in {normalised(gold) for gold in golds}


class SearchEnvironment:
    """One question: reward 1 for an answer that matches one of the gold answers. Any answer ends the attempt."""

    max_turns = MAX_TURNS

    def __init__(self, question: str, golds: Sequence[str], retriever: Retriever, passages: int) -> None:
        self._question, self._golds = question, tuple(golds)
        self._retriever, self._passages = retriever, passages
        self._answer: str | None = None
        self._searches = 0

    async def reset(self) -> str:
        self._answer, self._searches = None, 0
        return _statement(self._question)

    def parse(self, reply: str) -> str | None:
        return action_of("searchqa", reply)

    def hint(self) -> str:
        return "No action could be read. Reply with <search>words</search> or <answer>the answer</answer>."

    async def step(self, action: str) -> StepResult:
        kind, text = action[1 : action.index(">")], action[action.index(">") + 1 : action.rindex("<")]
        if kind == "answer":
            self._answer = text
            return StepResult("", done=True)
        self._searches += 1
        found = await self._retriever.search(text, self._passages) if text.strip() else []
        shown = "\n\n".join(f"({i}) {passage[:PASSAGE_CHARS]}" for i, passage in enumerate(found, start=1))
        return StepResult(shown or "Nothing was found.", done=False)

    def outcome(self) -> float:
        return 1.0 if self.success() else 0.0

    def success(self) -> bool:
        return self._answer is not None and exact_match(self._answer, self._golds)

    def summary(self) -> str:
        if self.success():
            return "The answer is right."
        if self._answer is None:
            return f"No answer was given in {self._searches} searches."
        return f"The answer {self._answer[:200]!r} is wrong."


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
        if source.data.passages < 1:
            raise ConfigError(f"task set {self.name!r}: data.passages={source.data.passages}: must be at least 1")
        self._retriever: Retriever | None = None
        self._read: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        if split not in self._read:
            self._read[split] = read_tasks(self.name, split, self._data, _problem)
        return self._read[split]

    def environment(self, task: Task) -> SearchEnvironment:
        try:
            fields = json.loads(task.problem)
            return SearchEnvironment(fields["prompt"], fields["golds"], self.retriever(), self._data.passages)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"problem {task.problem[:80]!r} is not one of {self.name!r}: take problems from TaskSet.problems()"
            ) from error

    def statement(self, task: Task) -> str:
        return _statement(str(json.loads(task.problem)["prompt"]))

    def check(self) -> None:
        """Builds the index, so that it exists when ranks start. Raises ConfigError on an invalid corpus."""
        self.retriever()

    def retriever(self) -> Retriever:
        if self._retriever is None:
            data = self._data
            local = LocalRetriever(Path(data.corpus)) if data.corpus else None
            self._retriever = local or RemoteRetriever(data.servers, data.request_timeout_s, self._answer_bytes)
        return self._retriever


def _statement(question: str) -> str:
    return f"{INSTRUCTION}\n\nQuestion: {question}"


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
