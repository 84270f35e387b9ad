"""Mathematics: problems with one final answer, from any dataset on disk, graded by math-verify.

problem  {"prompt": ..., "label": ...}
reply    any reasoning, its answer in the last \\boxed{...}
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from icrl_megatron.config import ConfigError, TaskSource
from icrl_megatron.tasks.base import StepResult
from icrl_megatron.tasks.datasets import Row, read_tasks
from icrl_megatron.tasks.grade_worker import last_box, normalised, plain_number
from icrl_megatron.tasks.grader import Grader
from icrl_megatron.types import Split, Task

INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."


class MathEnvironment:
    """One problem, one turn: reward 1 if the last box equals the label."""

    max_turns = 1

    def __init__(self, prompt: str, label: str, grader: Grader) -> None:
        self._prompt, self._label, self._grader = prompt, label, grader
        self._answer: str | None = None
        self._right = False

    async def reset(self) -> str:
        self._answer, self._right = None, False
        return self._prompt if "\\boxed" in self._prompt else f"{self._prompt}\n\n{INSTRUCTION}"

    def parse(self, reply: str) -> str | None:
        return last_box(reply) or None

    def hint(self) -> str:
        return "There is no answer in \\boxed{}."

    async def step(self, action: str) -> StepResult:
        self._answer = action
        self._right = await self._grader.correct(action, self._label)
        return StepResult("", done=True)

    def outcome(self) -> float:
        return 1.0 if self._right else 0.0

    def success(self) -> bool:
        return self._right

    def summary(self) -> str:
        if self._right:
            return "The final answer is right."
        if self._answer is None:
            return "The solution does not end with a final answer in \\boxed{}."
        return f"The final answer {self._answer[:200]} is wrong."


class Mathematics:
    """A task set over the files of `tasks.sources[...].data`."""

    def __init__(self, source: TaskSource) -> None:
        self.name, self._data = source.name, source.data
        for field, least in (("grading_workers", 1), ("grading_timeout_s", 0.01), ("numeric_tolerance", 0.0)):
            value = getattr(source.data, field)
            if not least <= value < 1e6:
                raise ConfigError(f"task set {self.name!r}: data.{field}={value}: must be at least {least:g}")
        self._grader: Grader | None = None
        self._read: dict[Split, list[Task]] = {}

    def problems(self, split: Split) -> Sequence[Task]:
        if split not in self._read:
            self._read[split] = read_tasks(self.name, split, self._data, _problem)
        return self._read[split]

    def environment(self, task: Task) -> MathEnvironment:
        try:
            fields = json.loads(task.problem)
            return MathEnvironment(fields["prompt"], fields["label"], self.grader())
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"problem {task.problem[:80]!r} is not one of {self.name!r}: take problems from TaskSet.problems()"
            ) from error

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
