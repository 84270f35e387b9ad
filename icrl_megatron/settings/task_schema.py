"""Settings of the task sets: where problems come from, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from icrl_megatron.settings.limits import Choice, Range


@dataclass
class PlannedAttempt:
    """What `icrl plan` expects of an attempt. 0: its own assumption about the task set (docs/PLANNER.md). Runs do not
    read it."""

    prompt_tokens: Annotated[float, Range(0)] = 0.0
    """Tokens of the first prompt."""
    reply_tokens: Annotated[float, Range(0)] = 0.0
    """Mean number of tokens of a reply."""
    observation_tokens: Annotated[float, Range(0)] = 0.0
    """Mean number of tokens of an observation."""
    calls: Annotated[float, Range(0)] = 0.0
    """Mean number of tool calls of an attempt, each in a turn of its own. The answer takes one more turn."""
    call_s: Annotated[float, Range(0)] = 0.0
    """Mean time of a tool call, in seconds. With `calls`, 0 means no time."""


@dataclass
class TaskSource:
    """An entry of `tasks.sources`. A task set with options has a class of its own, in settings/task_options.py."""

    name: str = "rulebook_hard"
    """A task set (docs/TASKS.md)."""
    weight: Annotated[float, Range(1e-6)] = 1.0
    """Share of this source in the mixture, relative to the weights of the others."""
    plan: PlannedAttempt = field(default_factory=PlannedAttempt)

    @property
    def call_format(self) -> str:
        """How its tool calls are written (docs/AGENTS.md)."""
        return "qwen3"


@dataclass
class ToolCacheSettings:
    """Answers of tools that are kept in one SQLite file (docs/TASKS.md)."""

    mode: Annotated[str, Choice(("off", "read_write", "replay"))] = "off"
    """replay: only answers of the file, at any age; a call that it does not have costs its episode. A run whose answers
    are all in the file needs no network."""
    path: str = ""
    """The file, on a local disk of each node. Several runs may use it at the same time."""
    expiry_s: Annotated[float | None, Range(0)] = None
    """Older answers are asked for again, in seconds. Null: never."""
    max_mib: Annotated[int, Range(1)] = 4096
    """Size at which the file takes no more answers, in MiB."""


@dataclass
class TaskSettings:
    sources: list[TaskSource] = field(default_factory=lambda: [TaskSource()])
    """Mixture the training tasks are drawn from."""
    limit: Annotated[int | None, Range(1)] = None
    """Use only this many training problems of each source, the first ones. Null: all."""
    curriculum: bool = False
    """Draw problems according to their recent success: those that always or never succeed are drawn less often. False:
    each problem in turn."""
    curriculum_floor: Annotated[float, Range(0, 1)] = 0.1
    """With a curriculum: the weight of a problem that always or never succeeds. An unseen problem has weight 1."""
    too_long: Annotated[str, Choice(("error", "drop"))] = "error"
    """What to do with problems whose prompt does not fit into rollout.context_tokens. error: end the run with a list of
    them before the model is loaded. drop: leave them out and count them."""
    tool_cache: ToolCacheSettings = field(default_factory=ToolCacheSettings)
