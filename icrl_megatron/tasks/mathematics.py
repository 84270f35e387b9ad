"""Mathematics: problems with one final answer, from any dataset on disk, graded by math-verify.

problem  {"prompt": ..., "label": ...}
reply    any reasoning, its answer in the last \\boxed{...}
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from icrl_megatron.config import ConfigError, TaskSource
from icrl_megatron.tasks.datasets import Row, read_tasks
from icrl_megatron.tasks.grade_worker import last_box, normalised, plain_number
from icrl_megatron.tasks.grader import Grader, check_limits
from icrl_megatron.tasks.single_turn import Form, SingleTurnEnvironment, Verdict, of_answer
from icrl_megatron.types import Split, Task

INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
FORM = Form(
    lambda reply: last_box(reply) or None,
    hint="There is no answer in \\boxed{}.",
    missing="The solution does not end with a final answer in \\boxed{}.",
)


class Mathematics:
    """A task set over the files of `tasks.sources[...].data`."""

    def __init__(self, source: TaskSource) -> None:
        self.name, self._data = source.name, source.data
        check_limits(source)
        self._grader: Grader | None = None
        self._read: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        if split not in self._read:
            self._read[split] = read_tasks(self.name, split, self._data, _problem)
        return self._read[split]

    def environment(self, task: Task) -> SingleTurnEnvironment:
        try:
            fields = json.loads(task.problem)
            prompt, label = fields["prompt"], fields["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"problem {task.problem[:80]!r} is not one of {self.name!r}: take problems from TaskSet.problems()"
            ) from error

        async def judge(answer: str) -> Verdict:
            return of_answer(await self.grader().correct(answer, label), answer, "final answer")

        question = prompt if "\\boxed" in prompt else f"{prompt}\n\n{INSTRUCTION}"
        return SingleTurnEnvironment(question, FORM, judge)

    def check(self) -> None:
        """Raises ConfigError on a label that means nothing to the grader: no answer could ever be right."""
        splits: tuple[Split, Split] = ("train", "heldout")
        tasks = [task for split in splits for task in self.problems(split)]
        labels = {str(json.loads(task.problem)["label"]): task for task in tasks}
        hard = [label for label in labels if plain_number(normalised(label)) is None]
        bad = [label for label, ok in zip(hard, self.grader().readable(hard), strict=True) if not ok]
        if bad:
            task = labels[bad[0]]
            raise ConfigError(
                f"{json.loads(task.problem)['where']}: the label {bad[0][:80]!r} is not mathematics, so no answer "
                f"could be right; mend or delete the row ({len(bad)} such labels)"
            )

    def grader(self) -> Grader:
        if self._grader is None:
            data = self._data
            self._grader = Grader(data.grading_workers, data.grading_timeout_s, data.numeric_tolerance)
        return self._grader


def _problem(row: Row) -> str:
    return json.dumps({"prompt": row.prompt, "label": row.label, "where": row.where}, ensure_ascii=False)
