"""Replay logs: the replies of episodes that were cut off, so that the episodes can continue in the next step.

When enough groups of a step are complete, the slowest episodes are interrupted (`rollout.oversample`). Their replies,
including the one that was cut off, can be kept (`rollout.partial`). In the next step the episode is played again from
its beginning, in a new environment. As long as a prompt equals the logged one, the logged reply is returned. A reply
that was cut off continues where it ended; its older tokens keep the log-probs they were sampled with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from icrl_megatron.engines.continuing import BeforeStop, continued, rest_seed
from icrl_megatron.rollout.speakers import Ask, Speaker, Speakers
from icrl_megatron.types import ByValue, Completion, IdArray, Task, as_json, id_array
from icrl_megatron.utils.errors import ConfigError


class InterruptedEpisodeError(Exception):
    """The step no longer needs this episode."""


@dataclass
class Stop:
    """Set once, for all episodes of a step."""

    asked: bool = False


@dataclass(frozen=True, eq=False)
class Logged(ByValue):
    """One reply with the prompt that it answered."""

    prompt_ids: IdArray
    completion: Completion

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", id_array(self.prompt_ids))


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
        json.dumps(
            {
                "task": task,
                "episodes": {i: [[r.prompt_ids, r.completion] for r in log.replies] for i, log in group.items()},
            },
            default=as_json,
        )
        for task, group in logs.items()
    ]


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
        found[Task(**line["task"])] = {
            int(index): ReplayLog([Logged(prompt, Completion.parse(reply)) for prompt, reply in replies])
            for index, replies in line["episodes"].items()
        }
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
        cursor, log = self.cursor, self.cursor.log
        begun: Completion | None = None
        if cursor.played < len(log.replies):
            prompt, completion = log.replies[cursor.played].prompt_ids, log.replies[cursor.played].completion
            if not np.array_equal(prompt, ask.prompt_ids):
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
                log.replies.append(Logged(id_array(ask.prompt_ids), begun))
            raise InterruptedEpisodeError
        reply = await self._fresh(ask, begun)
        log.replies.append(Logged(id_array(ask.prompt_ids), reply))
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
