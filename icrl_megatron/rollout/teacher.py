"""A task set's teacher as a speaker: demonstrations for `icrl sft` are ordinary episodes with log-probs of 0."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from icrl_megatron.rollout.checked_environment import Caller, WrongReturnError, text_of
from icrl_megatron.rollout.prompts import CHARS_A_TOKEN, Prompter
from icrl_megatron.rollout.speakers import Ask, Seeds, Speakers, SpeakersFor
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks.base import TaskSet, Teachable, Teacher, sendable
from icrl_megatron.types import Completion, Task, id_array
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class TeacherSpeaker:
    """Plays both roles of one episode. Raises ConfigError if a reply is longer than the settings allow a model, and
    EnvironmentFailure if the teacher fails."""

    teacher: Teacher
    prompter: Prompter
    caller: Caller

    async def reply(self, ask: Ask) -> Completion:
        critic = ask.role == "critique"
        if critic:
            text = self.caller.call("the teacher's criticise", lambda: self.teacher.criticise(ask.text), _text)
        else:
            text = self.caller.call("the teacher's act", lambda: self.teacher.act(ask.text, ask.critique), _text)
        begin = text[: CHARS_A_TOKEN * (ask.max_new_tokens + 1)]  # enough to detect that it is too long
        ids = self.prompter.encode_reply(begin, ask.stop)
        if len(ids) > ask.max_new_tokens or len(begin) < len(text):
            setting, unless = ("max_critique_tokens", "") if critic else ("max_turn_tokens", " (unless it is null)")
            more = "more than " if len(begin) < len(text) else ""
            raise ConfigError(
                f"A demonstration has {more}{len(ids)} tokens, and the limit is {ask.max_new_tokens}: raise "
                f"rollout.{setting}{unless} or rollout.context_tokens. It reads {text[:80]!r}."
            )
        return Completion(id_array(ids), np.zeros(len(ids), dtype=np.float32), "stop", 0)


def teacher_speakers(
    task_set: Callable[[str], TaskSet],
    prompter: Prompter,
    seeds: Seeds,
    timeout_s: float = RolloutSettings.environment_timeout_s,
) -> SpeakersFor:
    """One teacher per episode, each with its own random generator. `task_set` finds a task set by name
    (`registry.get`). Each call of a teacher may take `timeout_s`.

    The returned function raises EnvironmentFailure if creating one fails.
    """

    def speakers_of(task: Task, index: int) -> Speakers:
        teachable = task_set(task.source)
        assert isinstance(teachable, Teachable)  # checked in run/teach_checks.py
        rng = random.Random(seeds.of(task.task_id, index, 0, "teacher", 0))
        caller = Caller(task, timeout_s)
        teacher = caller.call("teacher", lambda: teachable.teacher(task, rng), _teacher)
        speaker = TeacherSpeaker(teacher, prompter, caller)
        return Speakers(speaker, speaker)

    return speakers_of


def _teacher(value: Any) -> Teacher:
    if not callable(getattr(value, "act", None)) or not callable(getattr(value, "criticise", None)):
        raise WrongReturnError("it must have act(observation, critique) and criticise(summary)")
    return value


def _text(value: object) -> str:
    return sendable(text_of(value))
