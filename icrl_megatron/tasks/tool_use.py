"""Tasks that are solved with tools: each turn of the solver is a call or the answer, which ends the attempt."""

from __future__ import annotations

import asyncio
import re

from icrl_megatron.agents.formats import FinalAnswer, Malformed, ToolCalls, ToolFormat, harmless
from icrl_megatron.agents.grammar import GRAMMARS, format_score, without_tags
from icrl_megatron.agents.judge import Judge
from icrl_megatron.agents.toolbox import Toolbox
from icrl_megatron.agents.tools import ToolFailure
from icrl_megatron.settings.task_schema import AgentSettings, TaskSource
from icrl_megatron.tasks.base import EnvironmentFailure, StepResult
from icrl_megatron.utils.errors import ConfigError

SHOWN_CHARS = 200


class ToolEnvironment:
    """One problem. The judge of its answer may wait, so it is asked in the step that ends the attempt."""

    def __init__(
        self,
        statement: str,
        form: ToolFormat,
        toolbox: Toolbox,
        judge: Judge,
        max_turns: int,
        agent: AgentSettings,
    ) -> None:
        """`judge` reads the final answer alone, at most `agent.answer_chars` of it, without tags."""
        self.max_turns, self.dialogue = max_turns, form.dialogue
        self._statement, self.form, self.toolbox, self._judge = statement, form, toolbox, judge
        self._agent, self._replies = agent, list[str]()
        self._malformed, self._changed_tags = "", 0
        self._most_calls: int | None = None
        self.answer: str | None = None
        self._score = 0.0
        self.session = toolbox.session()

    def limit_calls(self, most: int) -> None:
        self._most_calls = most

    async def reset(self) -> str:
        self.answer, self._score, self.session = None, 0.0, self.toolbox.session(self._most_calls)
        self._malformed, self._changed_tags, self._replies = "", 0, []
        return self._statement

    def parse(self, reply: str) -> str | None:
        """The calls or answer of a reply, written again: what `step` reads, and what tells repeated actions."""
        self._replies.append(reply)
        found = self.form.parse(reply)
        self._malformed = found.problem if isinstance(found, Malformed) else ""
        return self.form.render(found) if isinstance(found, ToolCalls | FinalAnswer) else None

    def hint(self) -> str:
        return self._malformed or f"No action could be read. {self.form.instructions()}"

    async def step(self, action: str) -> StepResult:
        """Runs the calls at the same time, or judges the answer. Raises EnvironmentFailure if the infrastructure of a
        tool or the judge failed."""
        asked = self.form.parse(action)
        try:
            if isinstance(asked, FinalAnswer):
                self.answer = asked.text
                read = without_tags(asked.text, self.toolbox.tools)[: self._agent.answer_chars]
                self._score = await self._judge(read)
                return StepResult("", done=True)
            if not isinstance(asked, ToolCalls):
                return StepResult(self.hint(), done=False)
            results = await asyncio.gather(*map(self.session.call, asked.calls))
        except ToolFailure as error:
            raise EnvironmentFailure(str(error)) from error
        texts = tuple(self._shown(result.text) for result in results)
        return StepResult(texts if len(texts) > 1 else texts[0], done=False)

    def _shown(self, text: str) -> str:
        text, changed = harmless(text, self.form.tags)
        self._changed_tags += changed
        return text

    def format_score(self) -> float:
        return format_score(self._replies, GRAMMARS[self._agent.grammar], self.toolbox.tools)

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
        """Whether there was an answer; calls by tool and by how they ended; tags of the format in tools' answers;
        whether the replies follow the grammar."""
        counts, session = self.session.counts, self.session
        calls = {f"calls_{_plain(name)}": session.of_tool(name) for name in self.toolbox.tools}
        ended = {
            "calls": counts.total(),
            "calls_repeated": session.made("repeat", "stopped"),
            "calls_invalid": session.made("invalid"),
            "calls_refused": session.made("refused"),
            "changed_tags": self._changed_tags,
            "format": self.format_score(),
        }
        if self.toolbox.cache is not None:
            ended["calls_cached"] = session.cached
        return {name: float(number) for name, number in {"answered": self.answer is not None, **calls, **ended}.items()}


def check_agent(source: TaskSource, *judges: str) -> None:
    """Raises ConfigError naming a setting of `source.agent` that cannot work. `judges`: those of the task set."""
    agent, where = source.agent, f"task set {source.name!r}: agent"
    if agent.judge not in ("", *judges):
        raise ConfigError(f"{where}.judge={agent.judge}: must be one of {', '.join(judges)}")
    at = agent.endpoint
    if agent.judge == "model" and not (at.url.startswith(("http://", "https://")) and at.model):
        raise ConfigError(
            f"{where}.judge=model needs agent.endpoint.url and .model (url={at.url!r}, model={at.model!r}), e.g. "
            "{url: 'http://host:8000/v1', model: NAME}"
        )


def _plain(name: str) -> str:
    """A tool's name as a part of a metric's name."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:50]
