"""The data types that the steps of training pass on: frozen dataclasses that flow one way.

    Task -> Completion -> Turn -> Attempt / Critique -> Episode -> Sample -> StepPlan(MicroBatch) -> StepStats

Token sequences stay on the rank that played them. All ranks exchange headers (`algo/headers.py`), and the sequences of
a sample (`SampleTokens`) go once to the replica that trains on it (`data/delivery.py`).

From `Sample` on, no code knows what a critic is. Prompts are tuples while they are encoded and sent to an engine; what
an engine answered and what is kept are NumPy arrays on the host (4 bytes per id and per log-prob), and the actor turns
them into tensors on its own device. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Ids = tuple[int, ...]
IdArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
Role = Literal["attempt", "critique", "revision"]
FinishReason = Literal["stop", "length", "abort"]
StopReason = Literal["done", "max_turns", "repeated", "context", "length", "deadline"]
"""Why an attempt ended."""


def id_array(ids: Sequence[int] | IdArray) -> IdArray:
    """Token ids as a read-only array. Raises OverflowError on an id that has more than 32 bits."""
    return _read_only(np.asarray(ids, dtype=np.int32))


def logprob_array(logprobs: Sequence[float] | FloatArray) -> FloatArray:
    """Log-probs as a read-only array: engines compute them in fp32 or less."""
    return _read_only(np.asarray(logprobs, dtype=np.float32))


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.flags.writeable = False  # frozen dataclasses share it
    return array


def joined(parts: Sequence[npt.NDArray[Any]], dtype: type[Any]) -> npt.NDArray[Any]:
    """The arrays end to end; an empty array without parts."""
    return np.concatenate(parts, dtype=dtype) if parts else np.zeros(0, dtype=dtype)


def as_json(value: Any) -> Any:
    """`default` of `json.dumps`: arrays become lists, dataclasses objects of their fields, at any depth."""
    return value.tolist() if isinstance(value, np.ndarray) else vars(value)


class ByValue:
    """Equality and hash of a frozen dataclass (eq=False) with arrays, which have neither as a value of their own."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[Any, ...]:
        return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in vars(self).values())


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


@dataclass(frozen=True, eq=False)
class Completion(ByValue):
    """What an engine returned for one request: token ids in, token ids out.

    Example: Completion(id_array((412, 9, 1)), logprob_array((-0.3, -1.2, -0.0)), "stop", weight_version=3)
    """

    ids: IdArray
    """Generated ids, the end token included when `finish_reason` is "stop"."""
    logprobs: FloatArray
    """Log-probability of each id under the distribution it was sampled from (temperature applied), same length."""
    finish_reason: FinishReason
    weight_version: int
    """Version of the weights that generated the newest token."""
    older: tuple[tuple[int, int], ...] = ()
    """(version, tokens) of the leading tokens, if an interrupted reply started under older weights."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", id_array(self.ids))
        object.__setattr__(self, "logprobs", logprob_array(self.logprobs))

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

    def stale(self, version: int | None) -> BoolArray:
        """True on tokens that weights before `version` generated; all False for None. Same length as `ids`."""
        if version is None:
            return np.zeros(len(self.ids), dtype=np.bool_)
        newest = len(self.ids) - sum(tokens for _, tokens in self.older)
        versions, tokens = zip(*self.older, (self.weight_version, newest), strict=True)
        return np.repeat(np.array(versions) < version, tokens)

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Completion:
        """Inverse of `as_json`, after a round trip through JSON."""
        older = tuple((version, tokens) for version, tokens in fields.get("older", ()))
        return Completion(**{**fields, "older": older})


@dataclass(frozen=True, eq=False)
class Turn(ByValue):
    """One reply of the solver and the environment's observation.

    Example: Turn(completion, "go to shelf 2", "go to shelf 2", "On shelf 2 you see a mug.", ids)
    """

    completion: Completion
    text: str
    """The decoded reply, for people and parsers. It is never encoded again."""
    action: str | None
    """The action parsed from the reply; None if there is none."""
    observation: str
    """The environment's answer. Only the critic reads the last turn's."""
    observation_ids: IdArray
    """Ids in the context between this reply and the next (end of turn, observation, next header); empty after the last
    turn."""
    cut_chars: int = 0
    """Characters cut from the answer (rollout.max_observation_bytes and max_observation_tokens)."""
    answer_chars: tuple[int, ...] = ()
    """If the reply made several calls: the length of each answer. `observation` is the answers, a line each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "observation_ids", id_array(self.observation_ids))


@dataclass(frozen=True, eq=False)
class Attempt(ByValue):
    """One attempt of the solver at a task: round 0 without a critique, later rounds after one (revisions).

    Token layout: prompt_ids, then for each turn completion.ids and observation_ids.

    Example: Attempt(0, prompt, prompt, (turn,), outcome=0.0, success=False, summary="The mug is cold.", "max_turns")
    """

    round: int
    prompt_ids: IdArray
    """The prompt given to the engine, including the critique if there was one."""
    plain_prompt_ids: IdArray
    """The critique-free prompt of the same task; equal to `prompt_ids` in round 0."""
    turns: tuple[Turn, ...]
    outcome: float
    """The environment's reward, in [0, 1]."""
    success: bool
    summary: str
    """The environment's description of the outcome, for the critic."""
    stop_reason: StopReason
    summary_cut_chars: int = 0
    """Characters cut from the summary, by the same limits as observations."""
    measures: tuple[tuple[str, float], ...] = ()
    """(name, value) pairs that the environment counted, e.g. ("calls", 3.0)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", id_array(self.prompt_ids))
        object.__setattr__(self, "plain_prompt_ids", id_array(self.plain_prompt_ids))

    def response_ids(self) -> IdArray:
        return joined([part for t in self.turns for part in (t.completion.ids, t.observation_ids)], np.int32)

    def loss_mask(self) -> BoolArray:
        """True on generated tokens, False on observations; same length as `response_ids()`."""
        lengths = [n for t in self.turns for n in (len(t.completion.ids), len(t.observation_ids))]
        return np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)

    def stale(self, version: int | None) -> BoolArray:
        """True on tokens that weights before `version` generated; same length as `response_ids()`."""
        return self._of_generated((t.completion.stale(version) for t in self.turns), np.bool_)

    def generated_tokens(self) -> int:
        return sum(len(turn.completion.ids) for turn in self.turns)

    def observation_tokens(self) -> int:
        return sum(len(turn.observation_ids) for turn in self.turns)

    def rollout_logprobs(self) -> FloatArray:
        """Engine log-probs, 0 on observation tokens; same length as `response_ids()`."""
        return self._of_generated((t.completion.logprobs for t in self.turns), np.float32)

    def _of_generated(self, values: Iterable[npt.NDArray[Any]], dtype: type[Any]) -> npt.NDArray[Any]:
        """The values of each turn's generated tokens, and 0 on observation tokens."""
        zeros = (np.zeros(len(t.observation_ids), dtype=dtype) for t in self.turns)
        return joined([part for both in zip(values, zeros, strict=True) for part in both], dtype)


@dataclass(frozen=True, eq=False)
class Critique(ByValue):
    """What the critic wrote about the attempt of the same round. Its reward is the improvement of the next attempt.

    Example: Critique(0, prompt, completion, "You did not heat the mug. Use the microwave first.")
    """

    round: int
    prompt_ids: IdArray
    completion: Completion
    text: str
    """What the solver reads: the text between <critic> tags, or the whole reply."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", id_array(self.prompt_ids))


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
        return sum(a.generated_tokens() for a in self.attempts) + sum(len(c.completion.ids) for c in self.critiques)


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


@dataclass(frozen=True, slots=True)
class Sample:
    """The header of one trainable sequence: what credit, balance and packing plans are computed from, on every rank.
    The two prompts differ only for internalized revisions.

    Example: the revision of episode 3, trained without the critique that it was generated with:
    Sample("set/17#3/1/revision", "set/17/solver", "revision", 1, behaviour_prompt_tokens=90, train_prompt_tokens=40,
    response_tokens=25, loss_tokens=20, same_prompt=False, calibrated=True, reward=1.0, advantage=0.7)
    """

    sample_id: str
    """"<task_id>#<episode>/<round>/<role>": unique within a step; the sort key wherever order must not depend on
    arrival."""
    group: str
    """Samples with the same group share a baseline."""
    role: Role
    """For metrics only: nothing after credit branches on it."""
    round: int
    behaviour_prompt_tokens: int
    train_prompt_tokens: int
    response_tokens: int
    loss_tokens: int
    same_prompt: bool
    """The sample is trained under the prompt that the engine saw."""
    calibrated: bool
    """True if w_t, or the shaping function instead of it, applies (internalized revisions with calibration on)."""
    reward: float
    advantage: float = 0.0
    rank: int = 0
    """The rank that has the tokens."""

    def task_id(self) -> str:
        return self.sample_id.rsplit("#", 1)[0]

    def episode_id(self) -> str:
        """<task_id>#<episode>"""
        return self.sample_id.rsplit("/", 2)[0]


@dataclass(frozen=True, eq=False)
class SampleTokens(ByValue):
    """The token sequences of a sample. Only the rank that played it and the ranks of the replica that trains on it have
    them."""

    behaviour_prompt_ids: IdArray
    train_prompt_ids: IdArray
    response_ids: IdArray
    loss_mask: BoolArray
    rollout_logprobs: FloatArray
    """Log-prob of every response token; 0 outside of the mask."""
    stale: BoolArray
    """True on tokens that older weights generated than those that are trained (`rollout.staleness`)."""


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
    """[S + 1]; the last sequence may be padding without loss tokens. Under context parallelism each may end in padding,
    which no other token sees."""
    loss_index_L: IntArray
    targets_L: IntArray
    rollout_logprobs_L: FloatArray
    advantages_L: FloatArray
    coefficients_L: FloatArray
    """c_t >= 0: the global normalizer of each token. The loss of a step is the sum of c_t * loss_t."""
    calibrated_L: BoolArray
    same_prompt_L: BoolArray
    """True if the sample is trained under the prompt that the engine saw, so that both log-probs are comparable."""
    stale_L: BoolArray
    """True on tokens that older weights generated: their log-probs do not measure the engine."""
    sample_index_L: IntArray
    """Index of the sample in `StepPlan.samples`, used to return per-token results to samples."""


@dataclass(frozen=True)
class StepPlan:
    """The work of one data-parallel replica in one step: `updates[u][m]` is micro-batch m of optimizer update u.

    Example: StepPlan(samples, ((micro_batch_0, micro_batch_1),), global_samples=256, global_loss_tokens=51_200)
    """

    samples: tuple[Sample, ...]
    """The headers of this replica's samples, in packing order."""
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
    """sample_id -> w_t of each loss token of calibrated samples: from the actor, those that this rank measured; in the
    loop, those of the episodes that this rank has."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Token means, maxima and counts by name, from `actor/measure.py`."""
