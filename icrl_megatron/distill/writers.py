"""Writes trajectories as OpenAI messages: one JSONL row each, with `messages`, `tools` (JSON) and `trajectory` (JSON:
what messages cannot hold, such as who wrote which part of a reply)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from icrl_megatron.distill import roles
from icrl_megatron.distill.trajectory import Segment, Trajectory
from icrl_megatron.utils.files import write_atomically


def write(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Writes the file, whole or not at all. Raises ConfigError on disk errors."""
    write_atomically(path, [json.dumps(row(one)) for one in trajectories], "the trajectories")


def row(one: Trajectory) -> dict[str, Any]:
    functions = [{"name": s.name, "description": s.description, "parameters": dict(s.parameters)} for s in one.tools]
    known = {
        "task_id": one.task_id,
        "correct": one.correct,
        "spent": [one.spent.read, one.spent.written],
        "versions": {spec.name: spec.version for spec in one.tools if spec.version},
        "segments": [[s.agent, s.kind, s.trained, len(s.text)] for s in one.segments],
    }
    return {
        "messages": messages(one),
        "tools": json.dumps([{"type": "function", "function": function} for function in functions]),
        "trajectory": json.dumps(known),
    }


def messages(one: Trajectory) -> list[dict[str, Any]]:
    """The conversation: a reply ends with its calls, and each observation is a tool message."""
    found: list[dict[str, Any]] = [{"role": "user", "content": one.problem}]
    if one.system:
        found.insert(0, {"role": "system", "content": one.system})
    waiting: list[tuple[str, str]] = []
    made = 0
    for segment in one.segments:
        if segment.kind == "observation":
            key, name = waiting.pop(0)
            found.append({"role": "tool", "content": segment.text, "tool_call_id": key, "name": name})
            continue
        if found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        if segment.call is None:
            found[-1]["content"] += _tagged(segment, found[-1]["content"])
            continue
        function = {"name": segment.call.name, "arguments": dict(segment.call.arguments)}
        waiting.append((f"call_{made}", segment.call.name))
        found[-1].setdefault("tool_calls", []).append({"id": f"call_{made}", "type": "function", "function": function})
        made += 1
    return found


def _tagged(segment: Segment, before: str) -> str:
    """A text in the tags of its agent, after the others of its message. Thinking has the white space of Qwen's chat
    templates."""
    gap = "\n" if before and not before.endswith("\n\n") else ""
    if segment.kind != "answer" and segment.agent == roles.THINK:
        return f"{gap}<think>\n{segment.text}\n</think>\n\n"
    tag = "answer" if segment.kind == "answer" else segment.agent
    return f"{gap}<{tag}>{segment.text}</{tag}>"
