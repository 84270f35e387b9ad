"""Tasks that are solved with tools: each turn of the solver is a call or the answer, which ends the attempt."""

from __future__ import annotations

import asyncio
import re

from icrl_megatron.agents.formats import FinalAnswer, Malformed, ToolCalls, ToolFormat, harmless
from icrl_megatron.agents.grammar import Grammar
from icrl_megatron.agents.toolbox import Toolbox
from icrl_megatron.agents.tools import ToolFailure
from icrl_megatron.tasks.base import EnvironmentFailure, StepResult
from icrl_megatron.tasks.single_turn import Judge, Verdict

ANSWER_CHARS = 4000


class ToolEnvironment:
    """One problem: reward 1 for a right answer."""

    def __init__(
        self,
        statement: str,
        form: ToolFormat,
        toolbox: Toolbox,
        judge: Judge,
        max_turns: int,
        grammar: Grammar | None = None,
    ) -> None:
        """`judge` reads the final answer alone, at most ANSWER_CHARS of it, without the format's tags. `grammar`:
        measured as `format`."""
        self.max_turns, self.dialogue = max_turns, form.dialogue
        self._statement, self._form, self._toolbox, self._judge = statement, form, toolbox, judge
        self._grammar, self._replies = grammar, list[str]()
        self._malformed, self._changed_tags = "", 0
        self._most_calls: int | None = None
        self.answer: str | None = None
        self._verdict: Verdict | None = None
        self.session = toolbox.session()

    def limit_calls(self, most: int) -> None:
        self._most_calls = most

    async def reset(self) -> str:
        self.answer, self._verdict, self.session = None, None, self._toolbox.session(self._most_calls)
        self._malformed, self._changed_tags, self._replies = "", 0, []
        return self._statement

    def parse(self, reply: str) -> str | None:
        """The calls or answer of a reply, written again: what `step` reads, and what tells repeated actions."""
        self._replies.append(reply)
        found = self._form.parse(reply)
        self._malformed = found.problem if isinstance(found, Malformed) else ""
        return self._form.render(found) if isinstance(found, ToolCalls | FinalAnswer) else None

    def hint(self) -> str:
        return self._malformed or f"No action could be read. {self._form.instructions()}"

    async def step(self, action: str) -> StepResult:
        """Runs the calls at the same time, or judges the answer. Raises EnvironmentFailure if the infrastructure of a
        tool or the judge failed."""
        asked = self._form.parse(action)
        if isinstance(asked, FinalAnswer):
            self.answer, _ = harmless(asked.text[:ANSWER_CHARS], self._form.tags)
            self._verdict = await self._judge(self.answer)
            return StepResult("", done=True)
        if not isinstance(asked, ToolCalls):
            return StepResult(self.hint(), done=False)
        try:
            results = await asyncio.gather(*map(self.session.call, asked.calls))
        except ToolFailure as error:
            raise EnvironmentFailure(str(error)) from error
        texts = tuple(self._shown(result.text) for result in results)
        return StepResult(texts if len(texts) > 1 else texts[0], done=False)

    def _shown(self, text: str) -> str:
        text, changed = harmless(text, self._form.tags)
        self._changed_tags += changed
        return text

    def outcome(self) -> float:
        return 1.0 if self.success() else 0.0

    def success(self) -> bool:
        return self._verdict is not None and self._verdict.right

    def summary(self) -> str:
        if self._verdict is None:
            return f"No answer was given in {self.session.counts.total()} calls."
        return self._verdict.remark

    def measures(self) -> dict[str, float]:
        """Whether there was an answer; calls by tool and by how they ended; tags of the format in tools' answers;
        whether the replies follow the grammar."""
        counts, session = self.session.counts, self.session
        calls = {f"calls_{_plain(name)}": session.of_tool(name) for name in self._toolbox.tools}
        ended = {
            "calls": counts.total(),
            "calls_repeated": session.made("repeat", "stopped"),
            "calls_invalid": session.made("invalid"),
            "calls_refused": session.made("refused"),
            "changed_tags": self._changed_tags,
        }
        if self._toolbox.cache is not None:
            ended["calls_cached"] = session.cached
        found: dict[str, float] = {"answered": self.answer is not None, **calls, **ended}
        if self._grammar is not None:
            found["format"] = self._grammar.score(self._replies)
        return {name: float(number) for name, number in found.items()}


def _plain(name: str) -> str:
    """A tool's name as a part of a metric's name."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:50]
