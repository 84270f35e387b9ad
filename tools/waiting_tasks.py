"""Rulebook problems whose environment waits before it answers, for `tools/bench_async.py`.

    icrl train any_text tasks.sources.0.name=tools/waiting_tasks.py:WaitingRulebook \
        tasks.sources.0.options='{median_s: 0.4, sigma: 1.0}'
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence

from icrl_megatron.settings.task_options import OwnSource
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Environment, StepResult
from icrl_megatron.types import Split, Task

LONGEST_S = 30.0


def wait_s(problem: str, action: str, call: int, median_s: float, sigma: float) -> float:
    """Seconds that the environment waits before it answers the `call`-th call of an attempt, counted from 1."""
    key = hashlib.blake2b(f"{problem}/{action}/{call}".encode()).digest()
    return min(median_s * random.Random(key).lognormvariate(0.0, sigma), LONGEST_S)


class WaitingEnvironment:
    """An environment of rulebook_easy. The wait of a call has a lognormal distribution. It depends on the problem, the
    action and the number of the call only, so the same episode waits equally long in all arms of a comparison."""

    def __init__(self, inner: Environment, problem: str, median_s: float, sigma: float) -> None:
        self._inner, self._problem, self._median_s, self._sigma = inner, problem, median_s, sigma
        self.max_turns, self._calls = inner.max_turns, 0
        self.parse, self.hint, self.outcome = inner.parse, inner.hint, inner.outcome
        self.success, self.summary = inner.success, inner.summary

    async def reset(self) -> str:
        return str(await self._inner.reset())

    async def step(self, action: str) -> StepResult:
        self._calls += 1
        wait = wait_s(self._problem, action, self._calls, self._median_s, self._sigma)
        if wait > 0:
            await asyncio.sleep(wait)
        return await self._inner.step(action)


class WaitingRulebook:
    name = "waiting_rulebook"

    def __init__(self, entry: OwnSource) -> None:
        self._median_s, self._sigma = float(entry.options["median_s"]), float(entry.options["sigma"])
        self._rulebook = registry.get("rulebook_easy")

    def problems(self, split: Split) -> Sequence[Task]:
        return [
            Task(f"{self.name}/{split}/{i}", self.name, split, one.problem)
            for i, one in enumerate(self._rulebook.problems(split))
        ]

    def environment(self, task: Task) -> WaitingEnvironment:
        inner = self._rulebook.environment(Task(task.task_id, "rulebook_easy", task.split, task.problem))
        return WaitingEnvironment(inner, task.problem, self._median_s, self._sigma)
