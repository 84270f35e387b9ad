"""The replies of a trajectory, and what makes a trajectory unusable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from icrl_megatron.agents.tools import ToolCall
from icrl_megatron.distill.rows import MOST_ROW_BYTES, BadRowError
from icrl_megatron.distill.trajectory import USER, Segment, Trajectory

_HOLDERS = (Mapping, list, tuple)
MOST_DEPTH = 100
"""Levels of the JSON of calls and tools."""


@dataclass
class ReplySegments:
    """One reply: texts, then calls, then what the model reads next."""

    texts: list[Segment] = field(default_factory=list)
    calls: list[Segment] = field(default_factory=list)
    observations: list[Segment] = field(default_factory=list)
    """One per call, or one message of the user."""

    def called(self) -> tuple[ToolCall, ...]:
        return tuple(segment.call for segment in self.calls if segment.call is not None)


def replies(segments: Sequence[Segment]) -> list[ReplySegments]:
    """The replies in order. Raises BadRowError for calls and answers that do not match."""
    found = [ReplySegments()]
    for segment in segments:
        reply = found[-1]
        if segment.kind == "observation":
            _observe(reply, segment)
            continue
        if reply.observations and len(reply.observations) >= len(reply.calls):
            reply = ReplySegments()
            found.append(reply)
        if segment.kind == "call":
            reply.calls.append(segment)
        elif reply.calls:
            raise _unanswered(reply)
        else:
            reply.texts.append(segment)
    if len(found[-1].observations) < len(found[-1].calls):
        raise _unanswered(found[-1])
    return [reply for reply in found if reply.texts or reply.calls]


def _observe(reply: ReplySegments, segment: Segment) -> None:
    if segment.agent == USER:
        if len(reply.observations) < len(reply.calls):
            raise _unanswered(reply)
        if reply.observations or not reply.texts:
            raise BadRowError("a message of the user without a reply before it; join the two messages")
    elif len(reply.observations) >= len(reply.calls):
        raise BadRowError(f"an answer of {segment.agent!r} without a call; delete the answer, or add its call")
    reply.observations.append(segment)


def _unanswered(reply: ReplySegments) -> BadRowError:
    call = reply.called()[len(reply.observations)]
    return BadRowError(f"a call of {call.name!r} without an answer; add the answer, or delete the call")


def check(trajectory: Trajectory) -> None:
    """Raises BadRowError, with a remedy, if the trajectory cannot be trained on."""
    if not trajectory.problem.strip():
        raise BadRowError("there is no message of the user; add the problem")
    if sum(len(segment.text) for segment in trajectory.segments) + len(trajectory.problem) > MOST_ROW_BYTES:
        raise BadRowError(f"more than {MOST_ROW_BYTES} characters; shorten it")
    known = {spec.name for spec in trajectory.tools}
    for reply in replies(trajectory.segments):
        for call in reply.called():
            if call.name not in known:
                has = ", ".join(sorted(known)) or "none"
                raise BadRowError(f"a call of the unknown tool {call.name!r} (its tools: {has}); add it to `tools`")
    if not any(segment.trained for segment in trajectory.segments):
        raise BadRowError("no token would be trained on; keep at least one reply with a weight other than 0")
    calls = [(s.call.name, dict(s.call.arguments)) for s in trajectory.segments if s.call]
    tools = [(spec.name, spec.description, dict(spec.parameters)) for spec in trajectory.tools]
    if _depth((calls, tools)) > MOST_DEPTH:
        raise BadRowError(
            f"arguments of a call, or a tool, nested too deeply (more than {MOST_DEPTH} levels); flatten them"
        )
    try:
        for text in (trajectory.problem, trajectory.system, *(s.text for s in trajectory.segments)):
            text.encode()
        json.dumps((calls, tools), allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRowError("a text with half a surrogate pair, which is no character; delete it") from error
    except ValueError as error:
        raise BadRowError(
            f"arguments of a call, or a tool, that JSON cannot hold ({error}); write numbers or texts"
        ) from error


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inside = (one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, _HOLDERS))
        level = [inner for one in inside for inner in one]
    return depth
