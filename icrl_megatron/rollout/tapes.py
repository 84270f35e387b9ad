"""Episodes that are cut off and go on later: a tape keeps the replies, and an episode replays what its tape holds.

When enough groups of a step are complete, the slowest episodes are interrupted (`rollout.oversample`). Their replies,
the one that was cut off included, can be kept (`rollout.partial`): in the next step the episode is played again from
its beginning, in an environment of its own, and the tape speaks as long as it is asked what it was asked before. A
reply that was cut off goes on where it ended; its older tokens keep the log-probs they were sampled with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from icrl_megatron.rollout.speakers import Ask, Cast, Speaker
from icrl_megatron.types import Completion, Ids, Task
from icrl_megatron.utils.errors import ConfigError


class InterruptedEpisodeError(Exception):
    """The rest of this step is not needed: the episode ends here."""


@dataclass
class Stop:
    """Set once, for all episodes of a step."""

    asked: bool = False


@dataclass
class Tape:
    """The replies of one episode in their order, each with the prompt it answered."""

    replies: list[tuple[Ids, Completion]] = field(default_factory=list)


Tapes = dict[Task, dict[int, Tape]]
"""The tapes of groups that were cut off, by task and episode index."""


def tokens(tapes: Tapes) -> int:
    """Tokens that tapes hold."""
    return sum(len(c.ids) for group in tapes.values() for tape in group.values() for _, c in tape.replies)


def copied(tapes: Tapes) -> Tapes:
    """The same replies on new tapes: those that go on are changed while they are played."""
    return {task: {i: Tape([*tape.replies]) for i, tape in group.items()} for task, group in tapes.items()}


def to_lines(tapes: Tapes) -> list[str]:
    """One JSON object for each group, from which `from_lines` makes it again."""
    return [
        json.dumps({"task": task, "episodes": {i: tape.replies for i, tape in group.items()}}, default=vars)
        for task, group in tapes.items()
    ]


def read(path: Path) -> Tapes:
    """The tapes of a file that `to_lines` filled; none where there is no such file. Raises ConfigError on another
    file."""
    if not path.exists():
        return {}
    try:
        return from_lines(path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not written by this version of the program ({error!r}); use the version that began the run, or "
            "set rollout.partial=false to go on without the episodes in it"
        ) from error


def from_lines(lines: Iterable[str]) -> Tapes:
    """Raises ValueError, KeyError or TypeError on lines that `to_lines` did not write."""
    found: Tapes = {}
    for line in map(json.loads, lines):
        found[Task(**line["task"])] = {
            int(index): Tape([(tuple(prompt), Completion.parse(reply)) for prompt, reply in replies])
            for index, replies in line["episodes"].items()
        }
    return found


def taped(cast: Cast, tape: Tape, stop: Stop) -> Cast:
    """The same speakers; solver and critic of an episode take turns, so one tape serves both."""
    reel = _Reel(tape, stop)
    return Cast(_Taped(cast.solver, reel), _Taped(cast.critic, reel))


@dataclass
class _Reel:
    tape: Tape
    stop: Stop
    played: int = 0


@dataclass(frozen=True)
class _Taped:
    speaker: Speaker
    reel: _Reel

    async def reply(self, ask: Ask) -> Completion:
        """Raises InterruptedEpisodeError once the step has enough."""
        reel, tape = self.reel, self.reel.tape
        begun: Completion | None = None
        if reel.played < len(tape.replies):
            prompt, completion = tape.replies[reel.played]
            if prompt != ask.prompt_ids:  # the environment answered otherwise this time: the rest is void
                del tape.replies[reel.played :]
            elif completion.finish_reason == "abort":
                begun = completion
                del tape.replies[reel.played :]
            else:
                reel.played += 1
                return completion
        if reel.stop.asked:
            if begun is not None:
                tape.replies.append((ask.prompt_ids, begun))
            raise InterruptedEpisodeError
        reply = await self._fresh(ask, begun)
        tape.replies.append((ask.prompt_ids, reply))
        if reply.finish_reason == "abort" and reel.stop.asked:
            raise InterruptedEpisodeError
        reel.played += 1
        return reply

    async def _fresh(self, ask: Ask, begun: Completion | None) -> Completion:
        if begun is None or not begun.ids:
            return await self.speaker.reply(ask)
        room = ask.max_new_tokens - len(begun.ids)
        if room < 1:
            return replace(begun, finish_reason="length")
        rest = await self.speaker.reply(replace(ask, prompt_ids=(*ask.prompt_ids, *begun.ids), max_new_tokens=room))
        ended = len(begun.ids) - sum(tokens for _, tokens in begun.older)
        older = (*begun.older, (begun.weight_version, ended))
        return Completion(
            (*begun.ids, *rest.ids), (*begun.logprobs, *rest.logprobs), rest.finish_reason, rest.weight_version, older
        )
