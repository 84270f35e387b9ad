"""Replay logs: the replies of episodes that were cut off, so that the episodes can continue in the next step.

When enough groups of a step are complete, the slowest episodes are interrupted (`rollout.oversample`). Their replies,
including the one that was cut off, can be kept (`rollout.partial`). In the next step the episode is played again from
its beginning, in a new environment. As long as a prompt equals the logged one, the logged reply is returned. A reply
that was cut off continues where it ended; its older tokens keep the log-probs they were sampled with.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from icrl_megatron.engines.continuing import BeforeStop, continued, rest_seed
from icrl_megatron.rollout.speakers import Ask, Speaker, Speakers
from icrl_megatron.types import Completion, IdArray, Task, as_json, id_array
from icrl_megatron.utils.errors import ConfigError


class InterruptedEpisodeError(Exception):
    """The step no longer needs this episode."""


@dataclass
class Stop:
    """Set once, for all episodes of a step."""

    asked: bool = False


@dataclass(frozen=True)
class Logged:
    """One reply, and a digest of the prompt that it answered: the prompts of an episode grow with the square of its
    turns.

    Example: Logged.of((412, 9), completion)
    """

    prompt: str
    completion: Completion

    @staticmethod
    def of(prompt_ids: Sequence[int] | IdArray, completion: Completion) -> Logged:
        return Logged(digest(prompt_ids), completion)


def digest(ids: Sequence[int] | IdArray) -> str:
    """Identifies a prompt among those of an episode."""
    return hashlib.blake2b(id_array(ids).tobytes(), digest_size=16).hexdigest()


@dataclass
class ReplayLog:
    """The replies of one episode in order."""

    replies: list[Logged] = field(default_factory=list)


ReplayLogs = dict[Task, dict[int, ReplayLog]]
"""Replay logs of groups that were cut off, by task and episode index."""


def tokens(logs: ReplayLogs) -> int:
    """Generated tokens in replay logs."""
    return sum(len(r.completion.ids) for group in logs.values() for log in group.values() for r in log.replies)


def copied(logs: ReplayLogs) -> ReplayLogs:
    """A copy with the same replies: playing an episode changes its log."""
    return {task: {i: ReplayLog([*log.replies]) for i, log in group.items()} for task, group in logs.items()}


def to_lines(logs: ReplayLogs) -> list[str]:
    """One JSON object for each group; `from_lines` reads them."""
    return [
        json.dumps({"task": task, "episodes": {i: log_fields(log) for i, log in group.items()}}, default=as_json)
        for task, group in logs.items()
    ]


def log_fields(log: ReplayLog) -> list[dict[str, Any]]:
    """An episode's replies as JSON values. Arrays are base64: as numbers they would take ten times as long."""
    return [
        {
            "prompt": reply.prompt,
            "ids": base64.b64encode(reply.completion.ids.tobytes()).decode(),
            "logprobs": base64.b64encode(reply.completion.logprobs.tobytes()).decode(),
            "finish_reason": reply.completion.finish_reason,
            "weight_version": reply.completion.weight_version,
            "older": reply.completion.older,
        }
        for reply in log.replies
    ]


def log_of(fields: Iterable[dict[str, Any]]) -> ReplayLog:
    """Inverse of `log_fields`. Raises ValueError, KeyError or TypeError on other values."""
    replies = []
    for one in fields:
        arrays = {
            name: np.frombuffer(base64.b64decode(one[name], validate=True), dtype=kind)
            for name, kind in (("ids", np.int32), ("logprobs", np.float32))
        }
        if len(arrays["ids"]) != len(arrays["logprobs"]):
            raise ValueError(f"{len(arrays['ids'])} ids and {len(arrays['logprobs'])} log-probs")
        rest = {name: one[name] for name in ("finish_reason", "weight_version", "older")}
        replies.append(Logged(str(one["prompt"]), Completion.parse(arrays | rest)))
    return ReplayLog(replies)


def read(path: Path) -> ReplayLogs:
    """Reads a file of `to_lines`; empty if there is none. Raises ConfigError if it cannot be read."""
    if not path.exists():
        return {}
    try:
        return from_lines(path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not written by this version of the program ({error!r}); use the version that began the run, or "
            "set rollout.partial=false to continue without the episodes in it"
        ) from error


def from_lines(lines: Iterable[str]) -> ReplayLogs:
    """Raises ValueError, KeyError or TypeError on lines that `to_lines` did not write."""
    found: ReplayLogs = {}
    for line in map(json.loads, lines):
        found[Task(**line["task"])] = {int(index): log_of(replies) for index, replies in line["episodes"].items()}
    return found


def recorded(speakers: Speakers, log: ReplayLog, stop: Stop, before_stop: BeforeStop) -> Speakers:
    """The same speakers with a replay log. Solver and critic share one log because they take turns."""
    cursor = _Cursor(log, stop, before_stop)
    return Speakers(_Recorded(speakers.solver, cursor), _Recorded(speakers.critic, cursor))


@dataclass
class _Cursor:
    log: ReplayLog
    stop: Stop
    before_stop: BeforeStop
    played: int = 0
    """Number of replies of the log that were returned or added so far."""


@dataclass(frozen=True)
class _Recorded:
    speaker: Speaker
    cursor: _Cursor

    async def reply(self, ask: Ask) -> Completion:
        """Raises InterruptedEpisodeError once the step has enough groups."""
        cursor, log, prompt = self.cursor, self.cursor.log, digest(ask.prompt_ids)
        begun: Completion | None = None
        if cursor.played < len(log.replies):
            completion = log.replies[cursor.played].completion
            if log.replies[cursor.played].prompt != prompt:
                # The environment answered differently this time, so the rest is invalid.
                del log.replies[cursor.played :]
            elif completion.finish_reason == "abort":
                begun = completion
                del log.replies[cursor.played :]
            else:
                cursor.played += 1
                return completion
        if cursor.stop.asked:
            if begun is not None:
                log.replies.append(Logged(prompt, begun))
            raise InterruptedEpisodeError
        reply = await self._fresh(ask, begun)
        log.replies.append(Logged(prompt, reply))
        if reply.finish_reason == "abort" and cursor.stop.asked:
            raise InterruptedEpisodeError
        cursor.played += 1
        return reply

    async def _fresh(self, ask: Ask, begun: Completion | None) -> Completion:
        if begun is not None:
            begun = begun.first(len(self.cursor.before_stop(begun.ids, ask.stop)))
        if begun is None or not len(begun.ids):
            return await self.speaker.reply(ask)
        remaining = ask.max_new_tokens - len(begun.ids)
        if remaining < 1:
            return replace(begun, finish_reason="length")
        prompt, seed = (*ask.prompt_ids, *begun.ids.tolist()), rest_seed(ask.seed, len(begun.ids))
        rest = await self.speaker.reply(replace(ask, prompt_ids=prompt, max_new_tokens=remaining, seed=seed))
        return continued(begun, rest)
