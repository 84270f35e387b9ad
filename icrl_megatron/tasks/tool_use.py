"""Tasks that are solved with tools: each turn of the solver is a call or the answer, which ends the attempt."""

from __future__ import annotations

import re
from typing import ClassVar

from icrl_megatron.agents.formats import FinalAnswer, Malformed, ToolCalls, ToolFormat, harmless
from icrl_megatron.agents.grammar import GRAMMARS, format_score, without_tags
from icrl_megatron.agents.judge import Judge
from icrl_megatron.agents.toolbox import Toolbox
from icrl_megatron.agents.tools import ToolCall, ToolFailure, ToolSpec
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import ToolsSource
from icrl_megatron.settings.task_sections import Answers
from icrl_megatron.tasks.base import Environment, EnvironmentFailure, Opening, StepResult
from icrl_megatron.tasks.single_turn import AnswerCheck, SingleTurnTasks
from icrl_megatron.tasks.tools import OffersTools, SourceTools
from icrl_megatron.types import Task

SHOWN_CHARS, MAX_TURNS = 200, 30


class ToolEnvironment:
    """One problem. The judge of its answer may wait, so it is asked in the step that ends the attempt."""

    shares_answers = True

    def __init__(
        self,
        statement: str | Opening,
        form: ToolFormat,
        toolbox: Toolbox,
        judge: Judge,
        max_turns: int,
        agent: Answers,
        whole: bool = False,
    ) -> None:
        """`judge` reads the final answer alone: at most `agent.answer_chars` of it, without tags. `whole`: all of it,
        because it is a program."""
        self.max_turns, self.dialogue = max_turns, form.dialogue
        self.statement, self.form, self.toolbox, self._judge = statement, form, toolbox, judge
        self._agent, self._whole, self._replies = agent, whole, list[str]()
        self._malformed, self._changed_tags = "", 0
        self._most_calls: int | None = None
        self.answer: str | None = None
        self._score = 0.0
        self.session = toolbox.session()

    @property
    def opening(self) -> Opening:
        return Opening.of(self.statement)

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        return tuple(tool.spec for tool in self.toolbox.tools.values())

    @property
    def stateful(self) -> tuple[str, ...]:
        return tuple(name for name, tool in self.toolbox.stateful.items() if tool.open() is not tool)

    def mistake(self, call: ToolCall) -> str:
        return self.toolbox.mistake(call)

    def limit_calls(self, most: int) -> None:
        self._most_calls = most

    async def reset(self) -> str | Opening:
        self.answer, self._score, self.session = None, 0.0, self.toolbox.session(self._most_calls)
        self._malformed, self._changed_tags, self._replies = "", 0, []
        return self.statement

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
                text = without_tags(asked.text, self.toolbox.tools)[: self._agent.answer_chars]
                self._score = await self._judge(asked.text if self._whole else text)
                return StepResult("", done=True)
            if not isinstance(asked, ToolCalls):
                return StepResult(self.hint(), done=False)
            results = await self.session.call_all(asked.calls)
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


class CheckedAnswer(ToolEnvironment):
    """One whose answer is checked as without tools, so that the critic reads the same remark."""

    def __init__(
        self,
        statement: str | Opening,
        tools: SourceTools,
        check: AnswerCheck,
        max_turns: int,
        agent: Answers,
        whole: bool,
    ) -> None:
        super().__init__(statement, tools.form, tools.toolbox, self._scored, max_turns, agent, whole)
        self._check, self._remark = check, ""

    async def _scored(self, answer: str) -> float:
        verdict = await self._check(answer)
        self._remark = verdict.remark
        return float(verdict.right)

    def summary(self) -> str:
        return super().summary() if self.answer is None else self._remark


class ToolTasks(OffersTools, SingleTurnTasks):
    """Questions with one answer, which are solved with tools if `agent.tools` names any."""

    whole_answer: ClassVar[bool] = False
    """See `ToolEnvironment`."""

    def __init__(self, source: ToolsSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """Raises ConfigError as `SourceTools` does."""
        super().__init__(source)
        self.tools, self._agent = SourceTools(source, source.agent.tools, answer_bytes), source.agent

    def environment(self, task: Task) -> Environment:
        if not self.tools.names:
            return super().environment(task)
        statement, check = self._asked(task)
        return CheckedAnswer(statement, self.tools, check, MAX_TURNS, self._agent, self.whole_answer)

    def check(self) -> None:
        """Raises ConfigError for a tool that does not work."""
        self.tools.check()


def _plain(name: str) -> str:
    """A tool's name as a part of a metric's name."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:50]
