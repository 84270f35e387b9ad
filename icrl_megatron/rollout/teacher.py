"""A task set's teacher as a speaker: demonstrations for `icrl sft` are ordinary episodes, with log-probs of 0."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from icrl_megatron.config import ConfigError
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import Ask, Cast, Casting, Seeds
from icrl_megatron.tasks.base import TaskSet, Teachable, Teacher
from icrl_megatron.types import Completion, Task


@dataclass(frozen=True)
class TeacherSpeaker:
    """Plays one episode, both roles. Raises ConfigError when a reply is longer than the settings allow a model."""

    teacher: Teacher
    prompter: Prompter

    async def reply(self, ask: Ask) -> Completion:
        critic = ask.role == "critique"
        text = self.teacher.criticise(ask.text) if critic else self.teacher.act(ask.text, ask.critique)
        ids = self.prompter.encode_reply(text)
        if len(ids) > ask.max_new_tokens:
            setting = "max_critique_tokens" if critic else "max_turn_tokens"
            raise ConfigError(
                f"A demonstration has {len(ids)} tokens and room for {ask.max_new_tokens}: raise rollout.{setting} or "
                f"rollout.context_tokens. It reads {text[:80]!r}."
            )
        return Completion(ids, (0.0,) * len(ids), "stop", 0)


def teacher_casting(task_set: Callable[[str], TaskSet], prompter: Prompter, seeds: Seeds) -> Casting:
    """One teacher per episode, with randomness of its own. `task_set` finds a task set by name (`registry.get`).

    The casting raises ConfigError for a task set that has no teacher.
    """

    def cast(task: Task, index: int) -> Cast:
        teachable = task_set(task.source)
        if not isinstance(teachable, Teachable):
            raise ConfigError(
                f"Task set {task.source!r} has no teacher for the warm start: take it out of tasks.sources, or give it "
                "teacher() and vocabulary()."
            )
        rng = random.Random(seeds.of(task.task_id, index, 0, "teacher", 0))
        speaker = TeacherSpeaker(teachable.teacher(task, rng), prompter)
        return Cast(speaker, speaker)

    return cast
