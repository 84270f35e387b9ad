"""Mathematics: problems with one final answer, from any dataset on disk, graded by math-verify.

problem  {"prompt": ..., "label": ...}
reply    any reasoning, its answer in the last \\boxed{...}; with `agent.tools`, calls of them and then the answer
"""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cached_property
from typing import Any

from icrl_megatron.agents.calculator import Calculator
from icrl_megatron.agents.formats import make_format
from icrl_megatron.agents.python import Python, PythonLimits
from icrl_megatron.agents.toolbox import Toolbox, ToolLimits
from icrl_megatron.agents.tools import Tool
from icrl_megatron.settings.task_options import MathSource, ProgramData, check_unused
from icrl_megatron.tasks.base import Environment
from icrl_megatron.tasks.datasets import DataRow, read_tasks
from icrl_megatron.tasks.grade_worker import last_box, normalised, plain_number
from icrl_megatron.tasks.grader import Grader
from icrl_megatron.tasks.single_turn import Form, Judge, SingleTurnTasks, Verdict, of_answer
from icrl_megatron.tasks.tool_use import ToolEnvironment
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

MAX_TURNS, CALL_S = 10, 50.0
"""With tools: turns of an attempt, and the longest call in seconds."""
INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
FORM = Form(
    lambda reply: last_box(reply) or None,
    hint="There is no answer in \\boxed{}.",
    missing="The solution does not end with a final answer in \\boxed{}.",
)


class Mathematics(SingleTurnTasks):
    """A task set of the files of `tasks.sources[...].data`."""

    form = FORM
    data: ProgramData

    def __init__(self, source: MathSource) -> None:
        """Raises ConfigError for an option that has no effect, and for a tool that cannot run here."""
        super().__init__(source)
        _check_tools(source)
        self._agent = source.agent
        self._toolbox: Toolbox | None = None
        if source.agent.tools:
            self._toolbox = Toolbox([self._tool(name) for name in source.agent.tools], self._limits())
            self._calls = make_format(source.agent.format, [tool.spec for tool in self._toolbox.tools.values()])

    def _limits(self) -> ToolLimits:
        return ToolLimits(call_s=CALL_S, tries=2, concurrency=self.data.grading_workers)

    def _tool(self, name: str) -> Tool:
        if name == "calculator":
            return Calculator()
        limits = PythonLimits(self.data.grading_timeout_s, self.data.program_memory_mib << 20)
        return Python(limits, self._agent.python_state, self.data.grading_workers)

    def environment(self, task: Task) -> Environment:
        if self._toolbox is None:
            return super().environment(task)
        statement, judge = self._asked(task)

        async def score(answer: str) -> float:
            return float((await judge(answer)).right)

        return ToolEnvironment(statement, self._calls, self._toolbox, score, MAX_TURNS, self._agent)

    def load(self, split: Split) -> list[Task]:
        return read_tasks(self.name, split, self.data, _problem)

    def question(self, problem: dict[str, Any]) -> tuple[str, Judge]:
        prompt, label = problem["prompt"], problem["label"]

        async def judge(answer: str) -> Verdict:
            return of_answer(await self.grader.correct(last_box(answer) or answer, label), answer, "final answer")

        if self._toolbox is not None:
            return f"{prompt}\n\n{self._calls.instructions()}", judge
        return prompt if "\\boxed" in prompt else f"{prompt}\n\n{INSTRUCTION}", judge

    def check(self) -> None:
        """Raises ConfigError on a label that the grader cannot parse, because no answer could be right."""
        splits: tuple[Split, Split] = ("train", "heldout")
        tasks = [task for split in splits for task in self.problems(split)]
        labels = {str(json.loads(task.problem)["label"]): task for task in tasks}
        hard = [label for label in labels if plain_number(normalised(label)) is None]
        bad = [label for label, ok in zip(hard, self.grader.readable(hard), strict=True) if not ok]
        if bad:
            task = labels[bad[0]]
            raise ConfigError(
                f"{json.loads(task.problem)['where']}: the label {bad[0][:80]!r} is not mathematics, so no answer "
                f"could be right; fix or delete the row ({len(bad)} such labels)"
            )

    @cached_property
    def grader(self) -> Grader:
        return Grader(self.data.grading_workers, self.data.grading_timeout_s, self.data.numeric_tolerance)


def _check_tools(source: MathSource) -> None:
    """Raises ConfigError for an option of tools that are not used."""
    if not source.agent.tools:
        others = [f"agent.{one.name}" for one in fields(source.agent) if one.name != "tools"]
        check_unused(source, [*others, "data.program_memory_mib"], "without agent.tools")
    if "python" not in source.agent.tools:
        check_unused(source, ["agent.python_state", "data.program_memory_mib"], "without python in agent.tools")


def _problem(row: DataRow) -> str:
    return json.dumps({"prompt": row.prompt, "label": row.label, "where": row.where}, ensure_ascii=False)
