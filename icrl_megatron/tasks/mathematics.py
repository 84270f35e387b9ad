"""Mathematics: problems with one final answer, from any dataset on disk, graded by math-verify.

problem  {"prompt": ..., "label": ...}
reply    any reasoning, its answer in the last \\boxed{...}
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from icrl_megatron.tasks.datasets import DataRow, read_tasks
from icrl_megatron.tasks.grade_worker import last_box, normalised, plain_number
from icrl_megatron.tasks.grader import Grader
from icrl_megatron.tasks.single_turn import Form, Judge, SingleTurnTasks, Verdict, of_answer
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
FORM = Form(
    lambda reply: last_box(reply) or None,
    hint="There is no answer in \\boxed{}.",
    missing="The solution does not end with a final answer in \\boxed{}.",
)


class Mathematics(SingleTurnTasks):
    """A task set of the files of `tasks.sources[...].data`."""

    form = FORM

    def load(self, split: Split) -> list[Task]:
        return read_tasks(self.name, split, self.data, _problem)

    def question(self, problem: dict[str, Any]) -> tuple[str, Judge]:
        prompt, label = problem["prompt"], problem["label"]

        async def judge(answer: str) -> Verdict:
            return of_answer(await self.grader.correct(answer, label), answer, "final answer")

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


def _problem(row: DataRow) -> str:
    return json.dumps({"prompt": row.prompt, "label": row.label, "where": row.where}, ensure_ascii=False)
