"""Episode -> samples: the last module that knows which text came from a critic."""

from __future__ import annotations

import math
import sys

import numpy as np

from icrl_megatron.algo.headers import AttemptHeader, CritiqueHeader, EpisodeHeader
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.types import Episode, Role, Sample, SampleTokens, Task
from icrl_megatron.utils.errors import ConfigError


def to_samples(episode: EpisodeHeader, settings: AlgoSettings, train_critic: bool) -> list[Sample]:
    """The trainable sequences of one episode, in playing order, without advantages.

    With `train_critic` False (a frozen critic, or none), critiques are left out; the revisions that follow them stay.
    Raises ConfigError on an outcome that is not a number in [0, 1].
    """
    for attempt in episode.attempts:
        _check_outcome(episode.task, attempt)
    samples = []
    for attempt in episode.attempts:
        samples.append(_solver_sample(episode, attempt, settings))
        if train_critic and attempt.round < len(episode.critiques):
            critique = episode.critiques[attempt.round]
            samples.append(_critic_sample(episode, critique, settings))
    return samples


def tokens_of(
    episode: Episode, role: Role, round: int, settings: AlgoSettings, version: int | None = None
) -> SampleTokens:
    """The token sequences of one of the samples of `to_samples`. `version`: that of the weights that are trained; None
    if they generated every token."""
    if role == "critique":
        critique = episode.critiques[round]
        ids, logprobs = critique.completion.ids, critique.completion.logprobs
        mask = np.ones(len(ids), dtype=np.bool_)
        stale = critique.completion.stale(version)
        return SampleTokens(critique.prompt_ids, critique.prompt_ids, ids, mask, logprobs, stale)
    attempt = episode.attempts[round]
    # Eq. 6: the ratio of a revision uses the prompt without the critique.
    plain = attempt.plain_prompt_ids if _internalised(round, settings) else attempt.prompt_ids
    response = attempt.response_ids(), attempt.loss_mask(), attempt.rollout_logprobs(), attempt.stale(version)
    return SampleTokens(attempt.prompt_ids, plain, *response)


def critique_reward(this: AttemptHeader, following: AttemptHeader) -> float:
    """A critique's reward: 1 if the next attempt succeeded, else the change in outcome (negative if it got worse)."""
    return 1.0 if following.success else following.outcome - this.outcome


def _internalised(round: int, settings: AlgoSettings) -> bool:
    return round > 0 and settings.internalise


def _solver_sample(episode: EpisodeHeader, attempt: AttemptHeader, settings: AlgoSettings) -> Sample:
    role: Role = "revision" if attempt.round else "attempt"
    internalised = _internalised(attempt.round, settings)
    return Sample(
        sample_id=f"{episode.task.task_id}#{episode.index}/{attempt.round}/{role}",
        group=group_key(episode.task, role, attempt.round, settings.group_by),
        role=role,
        round=attempt.round,
        behaviour_prompt_tokens=attempt.prompt_tokens,
        train_prompt_tokens=attempt.plain_prompt_tokens if internalised else attempt.prompt_tokens,
        response_tokens=attempt.response_tokens,
        loss_tokens=attempt.generated_tokens,
        same_prompt=attempt.same_prompt or not internalised,
        calibrated=internalised and (settings.calibration.enabled or settings.shaping_gamma > 0),
        reward=attempt.outcome,
        rank=episode.rank,
    )


def _critic_sample(episode: EpisodeHeader, critique: CritiqueHeader, settings: AlgoSettings) -> Sample:
    return Sample(
        sample_id=f"{episode.task.task_id}#{episode.index}/{critique.round}/critique",
        group=group_key(episode.task, "critique", critique.round, settings.group_by),
        role="critique",
        round=critique.round,
        behaviour_prompt_tokens=critique.prompt_tokens,
        train_prompt_tokens=critique.prompt_tokens,
        response_tokens=critique.generated_tokens,
        loss_tokens=critique.generated_tokens,
        same_prompt=True,
        calibrated=False,
        reward=critique_reward(episode.attempts[critique.round], episode.attempts[critique.round + 1]),
        rank=episode.rank,
    )


def group_key(task: Task, role: Role, round: int, group_by: str) -> str:
    """The group that shares a baseline, one string for all of its samples. `task_role` is Eq. 5: the solver's group
    (with revisions) and the critic's."""
    if group_by == "task":
        return task.task_id
    if group_by == "task_round_role":
        return sys.intern(f"{task.task_id}/{role}/{round}")
    return sys.intern(f"{task.task_id}/{'critic' if role == 'critique' else 'solver'}")


def _check_outcome(task: Task, attempt: AttemptHeader) -> None:
    if not (math.isfinite(attempt.outcome) and 0.0 <= attempt.outcome <= 1.0):
        raise ConfigError(
            f"The reward of task {task.task_id!r} (task set {task.source!r}, round {attempt.round}) is "
            f"{attempt.outcome}: outcome() of its environment must return a finite number in "
            "[0, 1]. Divide scores by their maximum."
        )
