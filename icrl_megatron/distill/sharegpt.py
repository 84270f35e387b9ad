"""ShareGPT: `conversations` of {"from": "human", "value": "..."}, and calls and observations as LLaMA-Factory has them.

{"conversations": [{"from": "human", "value": "..."},
{"from": "function_call", "value": "{\\"name\\": \\"search\\", \\"arguments\\": {...}}"},
{"from": "observation", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "...", "tools": "[...]"}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icrl_megatron.distill.messages import of_messages
from icrl_megatron.distill.rows import BadRowError, Fields, parsed
from icrl_megatron.distill.trajectory import Trajectory

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
}


def fits(columns: Sequence[str]) -> bool:
    return "conversations" in columns


def read(rows: Sequence[Fields], task_id: str) -> Trajectory:
    """Raises BadRowError."""
    (fields,) = rows
    turns = fields["conversations"]
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f"`conversations` is {str(turns)[:80]!r}, not a list of turns")
    messages: list[dict[str, Any]] = []
    for turn in turns:
        said = turn.get("from") if isinstance(turn, dict) else None
        if not isinstance(said, str) or said not in ROLES:
            raise BadRowError(f"a turn from {said!r}; the roles are {', '.join(ROLES)}")
        if ROLES[said] == "call":
            messages.append({"role": "assistant", "tool_calls": _calls(turn.get("value"))})
        else:
            messages.append({"role": ROLES[said], "content": turn.get("value"), "weight": turn.get("weight")})
    if fields.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": fields["system"]})
    return of_messages(messages, fields.get("tools"), task_id)


def _calls(value: Any) -> list[dict[str, Any]]:
    found = parsed(value, "a turn from function_call") if isinstance(value, str) else value
    calls = found if isinstance(found, list) else [found]
    return [{"function": call} for call in calls]
