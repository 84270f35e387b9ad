"""`python faulty_run.py FOLDER train RECIPE ...`: `icrl` as one rank whose environments have faults on demand.

Before each step, an environment of rulebook_easy removes a file from FOLDER, if there is one, and injects the fault in
its name. So a test decides when an episode has a fault.
"""

from __future__ import annotations

import math
import re
import sys
import time
from pathlib import Path
from typing import Any

from icrl_megatron import cli
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Environment, StepResult
from icrl_megatron.tasks.rulebook import Rulebook
from icrl_megatron.types import Task

TASK_SET = "rulebook_easy"
HANGING = ("sleep", "loop", "regex")
WRONG_VALUES = ("none", "nan", "type", "raise", "huge")
DROPPED = (*HANGING, "none", "nan", "type")
"""Faults for which the episode is dropped. After an exception it is retried, and a long text is truncated."""


class Misbehaving(Rulebook):
    """Rulebook with the faults from the folder `faults`."""

    def __init__(self, faults: Path) -> None:
        super().__init__(TASK_SET)
        self.faults = faults

    def environment(self, task: Task) -> Environment:
        environment: Any = super().environment(task)
        step, outcome = environment.step, environment.outcome

        async def faulty_step(action: str) -> Any:
            fault, result = self._taken(), await step(action)
            if fault == "nan":
                environment.outcome = lambda: math.nan
            return _misbehave(fault, result)

        environment.step, environment.outcome = faulty_step, outcome
        return environment

    def _taken(self) -> str:
        for path in sorted(self.faults.iterdir()):
            path.unlink()
            return path.name.partition(".")[0]
        return ""


def _misbehave(fault: str, result: StepResult) -> Any:
    if fault == "sleep":
        time.sleep(3600)
    if fault == "loop":
        while True:
            pass
    if fault == "regex":
        re.match(r"(a+)+$", "a" * 40 + "b")
    if fault == "raise":
        raise ZeroDivisionError("the environment divided by zero")
    if fault == "huge":
        return StepResult("x" * (12 << 20), result.done)
    return {"none": None, "type": (result.observation, result.done)}.get(fault, result)


if __name__ == "__main__":
    folder = Path(sys.argv.pop(1))
    registry._TASK_SETS[TASK_SET] = lambda: Misbehaving(folder)  # type: ignore[misc]
    cli.main()
