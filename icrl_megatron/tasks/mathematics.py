"""Mathematics: problems with one final answer, from any dataset on disk, graded by math-verify.

problem  {"prompt": ..., "label": ...}
reply    any reasoning, its answer in the last \\boxed{...}; one without a box is followed by another, up to
         `answer_turns`. With `agent.tools`, calls of them and then the answer
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_options import MathSource, check_unused
from icrl_megatron.settings.task_sections import ToolData
from icrl_megatron.tasks.answers import last_box
from icrl_megatron.tasks.datasets import read_tasks
from icrl_megatron.tasks.grader import Grader
from icrl_megatron.tasks.single_turn import AnswerCheck, Form, Verdict, of_answer
from icrl_megatron.tasks.tool_use import ToolTasks
from icrl_megatron.types import SPLITS, Split, Task
from icrl_megatron.utils.errors import ConfigError

INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
MANUAL = """\
The task is a problem of mathematics with one final answer, which is compared with the right one. Check it before you \
give it, because the first one ends the attempt.

Actions:
\\boxed{ANSWER} (at the end of your reasoning)"""
FORM = Form(
    lambda reply: last_box(reply) or None,
    hint="There is no answer in \\boxed{}.",
    missing="The solution does not end with a final answer in \\boxed{}.",
    manual=MANUAL,
)


class Mathematics(ToolTasks):
    """A task set of the files of `tasks.sources[...].data`."""

    form = FORM
    data: ToolData

    def __init__(self, source: MathSource, answer_bytes: int = RolloutSettings.max_observation_bytes) -> None:
        """Raises ConfigError as `ToolTasks` does."""
        super().__init__(source, answer_bytes)
        if "python" not in source.agent.tools:
            check_unused(source, ["data.program_memory_mib"], "without python in agent.tools")
        if self.tools.names:
            check_unused(source, ["answer_turns"], "with agent.tools")
        self.turns = source.answer_turns

    def load(self, split: Split) -> list[Task]:
        return read_tasks(self.name, split, self.data, lambda row: row.problem(label=row.label))

    def question(self, problem: dict[str, Any]) -> tuple[str, AnswerCheck]:
        prompt, label = problem["prompt"], problem["label"]

        async def check(answer: str) -> Verdict:
            return of_answer(await self.grader.correct(answer, label), answer, "final answer")

        if self.tools.names:
            return f"{prompt}\n\n{self.tools.form.instructions()}", check
        told = "\\boxed" in prompt or "\\boxed" in problem.get("system", "")
        return prompt if told else f"{prompt}\n\n{INSTRUCTION}", check

    def check(self) -> None:
        """Also raises ConfigError on a label that the grader cannot parse, because no answer could be right."""
        super().check()
        tasks = [task for split in SPLITS for task in self.problems(split)]
        labels = {str(json.loads(task.problem)["label"]): task for task in tasks}
        if bad := self.grader.unreadable(labels):
            task = labels[bad[0]]
            raise ConfigError(
                f"{json.loads(task.problem)['where']}: the label {bad[0][:80]!r} is not an answer, so no reply could "
                f"be right; fix or delete the row ({len(bad)} such labels)"
            )

    @cached_property
    def grader(self) -> Grader:
        return Grader(self.data.grading_workers, self.data.grading_timeout_s, self.data.numeric_tolerance)
