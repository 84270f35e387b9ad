"""Tasks that are solved with tools: each turn of the solver is a call or the answer, which ends the attempt."""

from __future__ import annotations

import re

from icrl_megatron.agents.formats import FinalAnswer, Malformed, ToolFormat
from icrl_megatron.agents.grammar import GRAMMARS, format_score, without_tags
from icrl_megatron.agents.judge import Judge
from icrl_megatron.agents.toolbox import Toolbox
from icrl_megatron.agents.tools import ToolCall, ToolFailure
from icrl_megatron.settings.task_schema import AgentSettings, TaskSource
from icrl_megatron.tasks.base import EnvironmentFailure, StepResult
from icrl_megatron.utils.errors import ConfigError

SHOWN_CHARS = 200


REWARDS = ("answer", "answer_times_format")
NO_CALLS_LEFT = "There are no calls left. Give the answer."


class ToolEnvironment:
    """One problem. The judge of its answer may wait, so it is asked in the step that ends the attempt."""

    def __init__(
        self,
        statement: str,
        form: ToolFormat,
        toolbox: Toolbox,
        judge: Judge,
        max_turns: int,
        agent: AgentSettings | None = None,
    ) -> None:
        self.max_turns = max_turns
        self._statement, self._form, self._toolbox, self._judge = statement, form, toolbox, judge
        self._agent = agent or AgentSettings()
        self._start()

    def _start(self) -> None:
        self.answer: str | None = None
        self.session = self._toolbox.session()
        self._malformed, self._score, self._refused = "", 0.0, 0
        self._replies: list[str] = []

    async def reset(self) -> str:
        self._start()
        return self._statement

    def parse(self, reply: str) -> str | None:
        """The call or answer of a reply, written again: what `step` reads, and what tells repeated actions."""
        self._replies.append(reply)
        found = self._form.parse(reply)
        self._malformed = found.problem if isinstance(found, Malformed) else ""
        return self._form.render(found) if isinstance(found, ToolCall | FinalAnswer) else None

    def hint(self) -> str:
        return self._malformed or f"No action could be read. {self._form.instructions()}"

    async def step(self, action: str) -> StepResult:
        """Runs a call, or takes the answer. Raises EnvironmentFailure where a tool's or judge's infrastructure
        failed."""
        asked = self._form.parse(action)
        try:
            if isinstance(asked, FinalAnswer):
                self.answer = asked.text
                self._score = await self._judge(self._judged(asked.text))
                return StepResult("", done=True)
            if not isinstance(asked, ToolCall):
                return StepResult(self.hint(), done=False)
            if self._agent.max_calls is not None and self.session.counts.total() >= self._agent.max_calls:
                self._refused += 1
                return StepResult(NO_CALLS_LEFT, done=self._refused > 1)
            return StepResult((await self.session.call(asked)).text, done=False)
        except ToolFailure as error:
            raise EnvironmentFailure(str(error)) from error

    def _judged(self, answer: str) -> str:
        return without_tags(answer, self._toolbox.tools)[: self._agent.answer_chars]

    def format_score(self) -> float:
        return format_score(self._replies, GRAMMARS[self._agent.grammar], self._toolbox.tools)

    def outcome(self) -> float:
        return self._score * (self.format_score() if self._agent.reward == "answer_times_format" else 1.0)

    def success(self) -> bool:
        """Whether the judge gave the full score; the format does not count here."""
        return self._score == 1.0

    def summary(self) -> str:
        if self.success():
            return "The answer is right."
        if self.answer is None:
            return f"No answer was given in {self.session.counts.total()} calls."
        return f"The answer {self.answer[:SHOWN_CHARS]!r} is wrong."

    def measures(self) -> dict[str, float]:
        """Whether there was an answer and the format was kept, and calls by tool and by how they ended."""
        counts, session = self.session.counts, self.session
        calls = {f"calls_{_plain(name)}": session.of_tool(name) for name in self._toolbox.tools}
        ended = {
            "calls": counts.total(),
            "calls_repeated": session.made("repeat", "stopped"),
            "calls_invalid": session.made("invalid"),
            "calls_refused": self._refused,
            "format": self.format_score(),
        }
        return {name: float(number) for name, number in {"answered": self.answer is not None, **calls, **ended}.items()}


def check_agent(source: TaskSource, *judges: str) -> None:
    """Raises ConfigError naming a setting of `source.agent` that cannot work. `judges`: those of the task set."""
    agent, where = source.agent, f"task set {source.name!r}: agent"
    for field, value, allowed in (
        ("judge", agent.judge, judges),
        ("grammar", agent.grammar, GRAMMARS),
        ("reward", agent.reward, REWARDS),
    ):
        if value not in allowed:
            raise ConfigError(f"{where}.{field}={value}: must be one of {', '.join(allowed)}")
    if agent.answer_chars < 1:
        raise ConfigError(f"{where}.answer_chars={agent.answer_chars}: must be at least 1")
    if agent.max_calls is not None and agent.max_calls < 0:
        raise ConfigError(f"{where}.max_calls={agent.max_calls}: must be at least 0, or null for no limit")
    endpoint = agent.endpoint
    if agent.judge != "model":
        return
    if not endpoint.url.startswith(("http://", "https://")) or not endpoint.model:
        raise ConfigError(
            f"{where}.judge=model needs agent.endpoint.url and .model (url={endpoint.url!r}, "
            f"model={endpoint.model!r}), e.g. {{url: 'http://host:8000/v1', model: NAME}}"
        )
    if not endpoint.timeout_s > 0 or endpoint.concurrency < 1:
        raise ConfigError(
            f"{where}.endpoint: timeout_s={endpoint.timeout_s} must be above 0, and concurrency="
            f"{endpoint.concurrency} at least 1"
        )


def _plain(name: str) -> str:
    """A tool's name as a part of a metric's name."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:50]
