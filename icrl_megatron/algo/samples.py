"""Episode -> samples: the last module that knows which text came from a critic."""

from __future__ import annotations

import math

import numpy as np

from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.types import Attempt, BoolArray, Critique, Episode, FloatArray, IdArray, Role, Sample, Task
from icrl_megatron.utils.errors import ConfigError

GROUPINGS = ("task_role", "task_round_role", "task")


def to_samples(episode: Episode, settings: AlgoSettings, train_critic: bool) -> list[Sample]:
    """The trainable sequences of one episode, in playing order, without advantages.

    With `train_critic` False (a frozen critic, or none), critiques are left out; the revisions that follow them stay.
    Raises ConfigError on an outcome that is not a number in [0, 1] and on an unknown `group_by`.
    """
    if settings.group_by not in GROUPINGS:
        raise ConfigError(f"algo.group_by is {settings.group_by!r}: choose one of {', '.join(GROUPINGS)}.")
    for attempt in episode.attempts:
        _check_outcome(episode.task, attempt)
    samples = []
    for attempt in episode.attempts:
        samples.append(_solver_sample(episode, attempt, settings))
        if train_critic and attempt.round < len(episode.critiques):
            critique = episode.critiques[attempt.round]
            samples.append(_critic_sample(episode, critique, settings))
    return samples


def critique_reward(this: Attempt, following: Attempt) -> float:
    """A critique's reward: 1 if the next attempt succeeded, else the change in outcome (negative if it got worse)."""
    return 1.0 if following.success else following.outcome - this.outcome


def _solver_sample(episode: Episode, attempt: Attempt, settings: AlgoSettings) -> Sample:
    revision = attempt.round > 0
    internalised = revision and settings.internalise
    return _sample(
        episode,
        settings,
        role="revision" if revision else "attempt",
        round=attempt.round,
        behaviour_prompt_ids=attempt.prompt_ids,
        # Eq. 6: the ratio of a revision uses the prompt without the critique.
        train_prompt_ids=attempt.plain_prompt_ids if internalised else attempt.prompt_ids,
        response_ids=attempt.response_ids(),
        loss_mask=attempt.loss_mask(),
        rollout_logprobs=attempt.rollout_logprobs(),
        calibrated=internalised and (settings.calibration.enabled or settings.shaping_gamma > 0),
        reward=attempt.outcome,
    )


def _critic_sample(episode: Episode, critique: Critique, settings: AlgoSettings) -> Sample:
    completion = critique.completion
    return _sample(
        episode,
        settings,
        role="critique",
        round=critique.round,
        behaviour_prompt_ids=critique.prompt_ids,
        train_prompt_ids=critique.prompt_ids,
        response_ids=completion.ids,
        loss_mask=np.ones(len(completion.ids), dtype=np.bool_),
        rollout_logprobs=completion.logprobs,
        calibrated=False,
        reward=critique_reward(episode.attempts[critique.round], episode.attempts[critique.round + 1]),
    )


def _sample(
    episode: Episode,
    settings: AlgoSettings,
    *,
    role: Role,
    round: int,
    behaviour_prompt_ids: IdArray,
    train_prompt_ids: IdArray,
    response_ids: IdArray,
    loss_mask: BoolArray,
    rollout_logprobs: FloatArray,
    calibrated: bool,
    reward: float,
) -> Sample:
    return Sample(
        sample_id=f"{episode.task.task_id}#{episode.index}/{round}/{role}",
        group=group_key(episode.task, role, round, settings.group_by),
        role=role,
        round=round,
        behaviour_prompt_ids=behaviour_prompt_ids,
        train_prompt_ids=train_prompt_ids,
        response_ids=response_ids,
        loss_mask=loss_mask,
        rollout_logprobs=rollout_logprobs,
        calibrated=calibrated,
        reward=reward,
    )


def group_key(task: Task, role: Role, round: int, group_by: str) -> str:
    """The group that shares a baseline. `task_role` is Eq. 5: the solver's group (with revisions) and the critic's."""
    if group_by == "task":
        return task.task_id
    if group_by == "task_round_role":
        return f"{task.task_id}/{role}/{round}"
    return f"{task.task_id}/{'critic' if role == 'critique' else 'solver'}"


def _check_outcome(task: Task, attempt: Attempt) -> None:
    if not (math.isfinite(attempt.outcome) and 0.0 <= attempt.outcome <= 1.0):
        raise ConfigError(
            f"The reward of task {task.task_id!r} (task set {task.source!r}, round {attempt.round}) is "
            f"{attempt.outcome}: outcome() of its environment must return a finite number in "
            "[0, 1]. Divide scores by their maximum."
        )
