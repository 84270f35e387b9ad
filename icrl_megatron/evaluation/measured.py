"""The part of `icrl select` that runs on each rank: plays questions, and records each one as soon as it is finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from icrl_megatron.rollout.episode import Ended
from icrl_megatron.rollout.played import RolloutRequest, require_playable
from icrl_megatron.rollout.source import EngineSource
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.tasks.datasets import row_hash
from icrl_megatron.types import DroppedEpisode, Episode, Task
from icrl_megatron.utils.files import AppendFile

SEEDS = Seeds(run=0, step=0, purpose="eval")
"""Fixed, so that two evaluations of the same problems differ only in their models."""
BATCH = 4
"""Times `rollout.concurrency`: the episodes of one batch on an engine. The tokens of a batch are held in memory, and an
engine waits for the last episodes of each batch."""


@dataclass(frozen=True)
class Playing:
    """An evaluation whose engines are ready."""

    source: EngineSource
    tasks: tuple[Task, ...]
    too_long: tuple[Task, ...]
    """Tasks that do not fit the context and are left out."""


@dataclass(frozen=True)
class Question:
    """What is known about one question."""

    task_id: str
    content: str
    """Hash of the problem, without its place in a file."""
    successes: tuple[bool, ...] = ()
    """Success of each sample; empty if the question was not measured."""
    answered: int | None = None
    """Samples with an answer; None if the task set does not count them. The others are wrong."""
    generated: int = 0
    """Tokens over all samples."""
    read: int = 0
    """The same of prompts and observations, each once."""
    failure: str = ""
    """Why it was not measured: the infrastructure failed, so it is played again. Empty if it was."""
    too_long: bool = False
    """It does not fit the context, and is not played again."""

    @property
    def finished(self) -> bool:
        return self.too_long or not self.failure

    @property
    def success(self) -> float:
        return sum(self.successes) / len(self.successes)

    @staticmethod
    def parse(fields: dict[str, Any], samples: int) -> Question:
        """Raises ValueError, TypeError or KeyError on anything but a record of so many samples."""
        found = Question(**{**fields, "successes": tuple(fields["successes"])})
        tries = found.successes
        if not found.failure and (len(tries) != samples or not all(isinstance(one, bool) for one in tries)):
            raise ValueError(f"it has no {samples} samples")
        return found


def record(path: Path, samples: int, playing: Playing, first: bool) -> None:
    """Plays all questions and appends each to `path` once its samples have ended. All ranks call it together; `first`
    is one of them. Returns early if no episode of a batch could be played and more batches would follow.

    Every record is one write to a file that all ranks have opened for appending. Raises what `EngineSource.play`
    raises, and ConfigError if every episode ended with an invalid answer."""
    with closing(AppendFile(path, "the measured questions")) as file:

        def add(question: Question) -> None:
            file.write(f"{json.dumps(asdict(question))}\n".encode())

        for task in playing.too_long if first else ():
            why = "it does not fit rollout.context_tokens"
            add(Question(task.task_id, row_hash(task), failure=why, too_long=True))
        source = replace(playing.source, on_group=lambda group: add(measured(group)))
        engines, concurrency = source.engines.share.count, source.setup.settings.concurrency
        size = max(1, BATCH * concurrency * engines // samples)
        for begin in range(0, len(playing.tasks), size):
            played = source.play(RolloutRequest(playing.tasks[begin : begin + size], samples, SEEDS, rounds=1))
            require_playable(played)
            if not played.headers:
                return
            source.progress.log(f"{min(begin + size, len(playing.tasks))} of {len(playing.tasks)} questions played")


def measured(group: Sequence[Ended]) -> Question:
    """The record of one question, from all of its episodes."""
    task, hashed = group[0].task, row_hash(group[0].task)
    for dropped in group:
        if isinstance(dropped, DroppedEpisode):
            return Question(task.task_id, hashed, failure=dropped.error[:300], too_long=dropped.too_long)
    episodes = sorted((one for one in group if isinstance(one, Episode)), key=lambda one: one.index)
    attempts = [episode.attempts[0] for episode in episodes]
    answered = [dict(attempt.measures).get("answered") for attempt in attempts]
    return Question(
        task.task_id,
        hashed,
        tuple(attempt.success for attempt in attempts),
        None if None in answered else sum(map(bool, answered)),
        sum(episode.generated_tokens() for episode in episodes),
        sum(len(a.prompt_ids) + a.observation_tokens() for a in attempts),
    )
