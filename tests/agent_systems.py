"""Plays a multi-agent system on Archive."""

from __future__ import annotations

import asyncio

from icrl_megatron.distill.events import Failed, Run
from icrl_megatron.distill.system import System, play_all
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.archive import Archive
from icrl_megatron.types import Task


def archive(name: str = "archive") -> Archive:
    task_set = registry.get(name)
    assert isinstance(task_set, Archive)
    return task_set


def play(system: System, tasks: list[Task], attempts: int = 1, concurrency: int = 16) -> list[Run | Failed]:
    found: list[Run | Failed] = []
    jobs = [(task, attempt) for task in tasks for attempt in range(attempts)]
    asyncio.run(play_all(system, jobs, concurrency, found.append))
    return found
