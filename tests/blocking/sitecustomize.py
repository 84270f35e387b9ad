"""On PYTHONPATH, every process knows a task set `hangs`: rulebook_easy, whose training tasks sleep in `step`."""

import time
from dataclasses import replace

from icrl_megatron.tasks import registry
from icrl_megatron.tasks.rulebook import Rulebook

HANGS = "a step hangs"


class Hangs:
    name = "hangs"

    def __init__(self):  # type: ignore[no-untyped-def]
        self.inner = Rulebook("rulebook_easy")

    def problems(self, split):  # type: ignore[no-untyped-def]
        tasks = self.inner.problems(split)
        return [replace(t, task_id=f"hangs/{split}/{i}", source="hangs") for i, t in enumerate(tasks)]

    def environment(self, task):  # type: ignore[no-untyped-def]
        made = self.inner.environment(replace(task, source="rulebook_easy"))
        if task.split == "train":

            async def step(action):  # type: ignore[no-untyped-def]
                print(HANGS, flush=True)
                time.sleep(3600)

            made.parse = lambda reply: reply  # a model that has learned little says nothing that could be taken
            made.step = step
        return made


registry._TASK_SETS["hangs"] = Hangs
