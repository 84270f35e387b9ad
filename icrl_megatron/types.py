"""The ladder: what flows between the stages, one way, each rung a frozen dataclass.

    Task -> Completion -> Turn -> Attempt / Critique -> Episode -> Sample -> StepPlan(MicroBatch) -> StepStats

From `Sample` on nothing knows what a critic is. Token sequences are tuples or NumPy arrays on the host; tensors are
made by the actor, at the last moment and on its own device. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Ids = tuple[int, ...]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Split = Literal["train", "heldout"]
Role = Literal["attempt", "critique", "revision"]
FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Task:
    """One problem of one task set, as plain data: `registry.environment(task)` makes it playable.

    Example: Task("rulebook_hard/train/17", "rulebook_hard", "train", "red square large dotted")
    """

    task_id: str
    """Unique over all task sets and splits; groups are formed on it."""
    source: str
    """Name of the task set in `tasks/registry.py`."""
    split: Split
    problem: str
    """All that the task set needs to rebuild the problem, as text (its own encoding; JSON where it is structured)."""


@dataclass(frozen=True)
class Completion:
    """What an engine returned for one request: tokens in, tokens out."""

    ids: Ids
    """Generated ids, the end token included when `finish_reason` is "stop"."""
    logprobs: tuple[float, ...]
    """Log-probability of each id under the distribution it was sampled from (temperature applied), same length."""
    finish_reason: FinishReason
    weight_version: int
    """Of the newest of its tokens."""
    older: tuple[tuple[int, int], ...] = ()
    """(version, tokens) of the leading tokens that older weights generated, in a reply that was interrupted."""

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Completion:
        """From JSON that was written of `vars`."""
        older = tuple((version, tokens) for version, tokens in fields.get("older", ()))
        kept = {"ids": tuple(fields["ids"]), "logprobs": tuple(fields["logprobs"]), "older": older}
        return Completion(**{**fields, **kept})


@dataclass(frozen=True)
class Turn:
    """One reply of the solver and what the environment answered."""

    completion: Completion
    text: str
    """The decoded reply, for people and parsers; never encoded again."""
    action: str | None
    """What was parsed out of it; None when nothing could be."""
    observation: str
    """The environment's answer; what it said after the last turn is read by the critic alone."""
    observation_ids: Ids
    """Ids appended to the context between this reply and the next (end of turn, observation, next header); empty after
    the last turn."""
    cut_chars: int = 0
    """Characters of the answer that `observation` lacks (rollout.max_observation_bytes and max_observation_tokens)."""


@dataclass(frozen=True)
class Attempt:
    """One try of the solver at a task: round 0 without a critique, later rounds after one.

    Token layout: prompt_ids, then for each turn completion.ids and observation_ids.
    """

    round: int
    prompt_ids: Ids
    """What the engine saw: with the critique, if there was one."""
    plain_prompt_ids: Ids
    """The critique-free prompt of the same task; equal to `prompt_ids` in round 0."""
    turns: tuple[Turn, ...]
    outcome: float
    """The environment's reward, in [0, 1]."""
    success: bool
    summary: str
    """What the environment says of the outcome; the critic reads it."""
    stop_reason: Literal["done", "max_turns", "repeated", "context", "length", "deadline"]
    summary_cut_chars: int = 0
    """Characters that `summary` lacks, by the same limits as observations."""

    def response_ids(self) -> Ids:
        return tuple(i for turn in self.turns for i in (*turn.completion.ids, *turn.observation_ids))

    def loss_mask(self) -> tuple[bool, ...]:
        """True on generated tokens, False on observations; same length as `response_ids()`."""
        return tuple(
            m for t in self.turns for m in (*[True] * len(t.completion.ids), *[False] * len(t.observation_ids))
        )

    def rollout_logprobs(self) -> tuple[float, ...]:
        """Engine log-probs, 0 on observation tokens; same length as `response_ids()`."""
        return tuple(p for t in self.turns for p in (*t.completion.logprobs, *[0.0] * len(t.observation_ids)))


@dataclass(frozen=True)
class Critique:
    """The critic's reading of the attempt of the same round; the next attempt is what it is paid for."""

    round: int
    prompt_ids: Ids
    completion: Completion
    text: str
    """What was handed to the solver: between <critic> tags, or the whole reply."""


@dataclass(frozen=True)
class Episode:
    """attempts[0], critiques[0], attempts[1], ...; len(critiques) is len(attempts) - 1."""

    task: Task
    index: int
    """Which of the task's G episodes this is."""
    attempts: tuple[Attempt, ...]
    critiques: tuple[Critique, ...]

    def generated_tokens(self) -> int:
        turns = sum(len(t.completion.ids) for a in self.attempts for t in a.turns)
        return turns + sum(len(c.completion.ids) for c in self.critiques)


@dataclass(frozen=True)
class DroppedEpisode:
    """An episode whose environment or grading failed, or whose prompt does not fit: counted, never trained on, never a
    reward of 0."""

    task: Task
    index: int
    error: str
    bad_answer: bool = False
    """The environment, or its server, answered what cannot be true (`tasks.base.BadAnswer`)."""
    late: bool = False
    """A call of the environment took longer than rollout.environment_timeout_s."""
    too_long: bool = False
    """A prompt of it did not fit the context (`tasks.too_long`)."""


@dataclass(frozen=True)
class UnplayedEpisode:
    """An episode that was cut off: its engine was lost, and it is played again once that was revived; or the step had
    enough without it, and there is no error."""

    task: Task
    index: int
    error: str


@dataclass(frozen=True)
class Sample:
    """One trainable sequence. The two prompts differ only for revisions that are being internalised."""

    sample_id: str
    """"<task_id>#<episode>/<round>/<role>": unique within a step; orders everything that must not depend on arrival."""
    group: str
    """Samples with the same group share a baseline."""
    role: Role
    """For metrics only: nothing after credit branches on it."""
    round: int
    behaviour_prompt_ids: Ids
    train_prompt_ids: Ids
    response_ids: Ids
    loss_mask: tuple[bool, ...]
    rollout_logprobs: tuple[float, ...]
    calibrated: bool
    """True where w_t applies (internalised revisions with calibration on), or the shaping function in its place."""
    reward: float
    advantage: float = 0.0

    def loss_tokens(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed end to end (thd). T tokens, S sequences, L loss tokens; loss tokens are those whose *prediction*
    is trained: `loss_index_L[i]` is the position whose hidden state predicts `targets_L[i]`."""

    tokens_T: IntArray
    positions_T: IntArray
    cu_seqlens: npt.NDArray[np.int32]
    """[S + 1]; the last sequence may be padding that carries no loss."""
    loss_index_L: IntArray
    targets_L: IntArray
    rollout_logprobs_L: FloatArray
    advantages_L: FloatArray
    coefficients_L: FloatArray
    """c_t >= 0: the global normaliser of each token. The loss of a step is a plain sum of c_t * loss_t."""
    calibrated_L: BoolArray
    same_prompt_L: BoolArray
    """True where a sample is trained under the prompt that the engine saw: only there can the two be compared."""
    sample_index_L: IntArray
    """Index of the sample in `StepPlan.samples`, for scattering per-token results back."""


@dataclass(frozen=True)
class StepPlan:
    """What one data-parallel replica does in one step: `updates[u][m]` is micro-batch m of optimizer update u."""

    samples: tuple[Sample, ...]
    """The samples of this replica, in packing order."""
    updates: tuple[tuple[MicroBatch, ...], ...]
    global_samples: int
    global_loss_tokens: int
    """Counts over all replicas, the denominators behind `coefficients_L`."""


@dataclass(frozen=True)
class StepStats:
    """What the actor measured over one step, already reduced over all ranks."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped_updates: int
    """Updates not applied because the loss or the gradient was not finite."""
    loss_tokens: int
    tokens: int
    calibration_weights: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """sample_id -> w_t of each loss token of the calibrated samples, of all replicas; the same on every rank."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Token means, maxima and counts by name; `actor/measure.py` makes them."""
