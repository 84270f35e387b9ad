"""The data types that the steps of training pass on: frozen dataclasses that flow one way.

    Task -> Completion -> Turn -> Attempt / Critique -> Episode -> Sample -> StepPlan(MicroBatch) -> StepStats

From `Sample` on, no code knows what a critic is. Token sequences are tuples or NumPy arrays on the host; the actor
turns them into tensors on its own device. This module does not import torch.
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
    """One problem of one task set, as plain data. `registry.environment(task)` returns its environment.

    Example: Task("rulebook_hard/train/17", "rulebook_hard", "train", "red square large dotted")
    """

    task_id: str
    """Unique over all task sets and splits; groups are formed by it."""
    source: str
    """Name of the task set in `tasks/registry.py`."""
    split: Split
    problem: str
    """What the task set needs to rebuild the problem, in its own encoding (JSON if it is structured)."""


@dataclass(frozen=True)
class Completion:
    """What an engine returned for one request: token ids in, token ids out.

    Example: Completion((412, 9, 1), (-0.3, -1.2, -0.0), "stop", weight_version=3)
    """

    ids: Ids
    """Generated ids, the end token included when `finish_reason` is "stop"."""
    logprobs: tuple[float, ...]
    """Log-probability of each id under the distribution it was sampled from (temperature applied), same length."""
    finish_reason: FinishReason
    weight_version: int
    """Version of the weights that generated the newest token."""
    older: tuple[tuple[int, int], ...] = ()
    """(version, tokens) of the leading tokens, if an interrupted reply started under older weights."""

    def first(self, count: int) -> Completion:
        """The first `count` tokens, and the versions that generated them."""
        older, left, newest = list[tuple[int, int]](), count, self.weight_version
        for version, tokens in self.older:
            if left <= tokens:
                newest = version
                break
            older.append((version, tokens))
            left -= tokens
        ids, logprobs = self.ids[:count], self.logprobs[:count]
        return Completion(ids, logprobs, self.finish_reason, newest, tuple(older))

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Completion:
        """Inverse of `vars`, after a round trip through JSON."""
        older = tuple((version, tokens) for version, tokens in fields.get("older", ()))
        kept = {"ids": tuple(fields["ids"]), "logprobs": tuple(fields["logprobs"]), "older": older}
        return Completion(**{**fields, **kept})


@dataclass(frozen=True)
class Turn:
    """One reply of the solver and the environment's observation.

    Example: Turn(completion, "go to shelf 2", "go to shelf 2", "On shelf 2 you see a mug.", (27, 4, 980, 5))
    """

    completion: Completion
    text: str
    """The decoded reply, for people and parsers. It is never encoded again."""
    action: str | None
    """The action parsed from the reply; None if there is none."""
    observation: str
    """The environment's answer. Only the critic reads the last turn's."""
    observation_ids: Ids
    """Ids in the context between this reply and the next (end of turn, observation, next header); empty after the last
    turn."""
    cut_chars: int = 0
    """Characters cut from the answer (rollout.max_observation_bytes and max_observation_tokens)."""
    answer_chars: tuple[int, ...] = ()
    """If the reply made several calls: the length of each answer. `observation` is the answers, a line each."""


@dataclass(frozen=True)
class Attempt:
    """One attempt of the solver at a task: round 0 without a critique, later rounds after one (revisions).

    Token layout: prompt_ids, then for each turn completion.ids and observation_ids.

    Example: Attempt(0, prompt, prompt, (turn,), outcome=0.0, success=False, summary="The mug is cold.", "max_turns")
    """

    round: int
    prompt_ids: Ids
    """The prompt given to the engine, including the critique if there was one."""
    plain_prompt_ids: Ids
    """The critique-free prompt of the same task; equal to `prompt_ids` in round 0."""
    turns: tuple[Turn, ...]
    outcome: float
    """The environment's reward, in [0, 1]."""
    success: bool
    summary: str
    """The environment's description of the outcome, for the critic."""
    stop_reason: Literal["done", "max_turns", "repeated", "context", "length", "deadline"]
    summary_cut_chars: int = 0
    """Characters cut from the summary, by the same limits as observations."""
    measures: tuple[tuple[str, float], ...] = ()
    """(name, value) pairs that the environment counted, e.g. ("calls", 3.0)."""

    def response_ids(self) -> Ids:
        return tuple(i for turn in self.turns for i in (*turn.completion.ids, *turn.observation_ids))

    def loss_mask(self) -> tuple[bool, ...]:
        """True on generated tokens, False on observations; same length as `response_ids()`."""
        return tuple(
            m for t in self.turns for m in (*[True] * len(t.completion.ids), *[False] * len(t.observation_ids))
        )

    def read_tokens(self) -> int:
        """Tokens of the prompt and of the observations, each once."""
        return len(self.prompt_ids) + sum(len(turn.observation_ids) for turn in self.turns)

    def rollout_logprobs(self) -> tuple[float, ...]:
        """Engine log-probs, 0 on observation tokens; same length as `response_ids()`."""
        return tuple(p for t in self.turns for p in (*t.completion.logprobs, *[0.0] * len(t.observation_ids)))


@dataclass(frozen=True)
class Critique:
    """What the critic wrote about the attempt of the same round. Its reward is the improvement of the next attempt.

    Example: Critique(0, prompt, completion, "You did not heat the mug. Use the microwave first.")
    """

    round: int
    prompt_ids: Ids
    completion: Completion
    text: str
    """What the solver reads: the text between <critic> tags, or the whole reply."""


@dataclass(frozen=True)
class Episode:
    """attempts[0], critiques[0], attempts[1], ...; len(critiques) is len(attempts) - 1.

    Example: Episode(task, 3, (failed, revised), (critique,))
    """

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
    """An episode whose environment or grading failed, or whose prompt does not fit. It is counted and never trained on,
    not even with a reward of 0.

    Example: DroppedEpisode(task, 3, "step took longer than rollout.environment_timeout_s = 60 s", late=True)
    """

    task: Task
    index: int
    error: str
    bad_answer: bool = False
    """The environment or its server returned an invalid answer (`tasks.base.BadAnswer`)."""
    late: bool = False
    """A call of the environment took longer than rollout.environment_timeout_s."""
    too_long: bool = False
    """One of its prompts did not fit the context (`tasks.too_long`)."""


@dataclass(frozen=True)
class UnplayedEpisode:
    """An episode that was cut off. If its engine was lost, `error` describes that and the episode is played again. If
    the step had enough groups without it, `error` is empty.

    Example: UnplayedEpisode(task, 3, "The SGLang server died.")
    """

    task: Task
    index: int
    error: str


@dataclass(frozen=True)
class Sample:
    """One trainable sequence. The two prompts differ only for internalized revisions.

    Example: the revision of episode 3, trained without the critique that it was generated with:
    Sample("set/17#3/1/revision", "set/17/solver", "revision", 1, (*plain, *critique), plain, response, mask,
    logprobs, calibrated=True, reward=1.0, advantage=0.7)
    """

    sample_id: str
    """"<task_id>#<episode>/<round>/<role>": unique within a step; the sort key wherever order must not depend on
    arrival."""
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
    """True if w_t, or the shaping function instead of it, applies (internalized revisions with calibration on)."""
    reward: float
    advantage: float = 0.0

    def task_id(self) -> str:
        return self.sample_id.rsplit("#", 1)[0]

    def loss_tokens(self) -> int:
        return sum(self.loss_mask)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed end to end (thd). T tokens, S sequences, L loss tokens. `loss_index_L[i]` is the position whose
    hidden state predicts `targets_L[i]`.

    Example: prompts (5, 6) and (7,) with replies (8, 9) and (4,): tokens_T = 5 6 8 9 7 4, cu_seqlens = 0 4 6,
    loss_index_L = 1 2 4, targets_L = 8 9 4
    """

    tokens_T: IntArray
    positions_T: IntArray
    cu_seqlens: npt.NDArray[np.int32]
    """[S + 1]; the last sequence may be padding without loss tokens."""
    loss_index_L: IntArray
    targets_L: IntArray
    rollout_logprobs_L: FloatArray
    advantages_L: FloatArray
    coefficients_L: FloatArray
    """c_t >= 0: the global normalizer of each token. The loss of a step is the sum of c_t * loss_t."""
    calibrated_L: BoolArray
    same_prompt_L: BoolArray
    """True if the sample is trained under the prompt that the engine saw, so that both log-probs are comparable."""
    sample_index_L: IntArray
    """Index of the sample in `StepPlan.samples`, used to return per-token results to samples."""


@dataclass(frozen=True)
class StepPlan:
    """The work of one data-parallel replica in one step: `updates[u][m]` is micro-batch m of optimizer update u.

    Example: StepPlan(samples, ((micro_batch_0, micro_batch_1),), global_samples=256, global_loss_tokens=51_200)
    """

    samples: tuple[Sample, ...]
    """The samples of this replica, in packing order."""
    updates: tuple[tuple[MicroBatch, ...], ...]
    global_samples: int
    global_loss_tokens: int
    """Counts over all replicas: the denominators in `coefficients_L`."""


@dataclass(frozen=True)
class StepStats:
    """The actor's measurements of one step, reduced over all ranks.

    Example: StepStats(0.02, grad_norm=0.4, learning_rate=1e-6, skipped_updates=0, loss_tokens=51_200, tokens=90_112)
    """

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
    """Token means, maxima and counts by name, from `actor/measure.py`."""
