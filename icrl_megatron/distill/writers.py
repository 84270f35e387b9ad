"""Writes trajectories as OpenAI messages: JSONL, or Parquet. `readers.read` reads them back exactly.

Each row has `messages` and `tools` (JSON), which chat templates and other trainers read, and `trajectory` (JSON, see
`messages.py`). Arguments of calls are objects in JSONL, as chat templates expect. They are JSON in Parquet, where
every call would otherwise have the arguments of all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from icrl_megatron.distill.check import check, replies
from icrl_megatron.distill.messages import EXTRA
from icrl_megatron.distill.trajectory import USER, Trajectory
from icrl_megatron.distill.written import content
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import replaced, write_atomically


def write(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Writes a .jsonl or .parquet file, whole or not at all.

    Raises BadRowError for a trajectory that no reader would accept, ConfigError for another suffix and on disk errors.
    """
    if path.suffix == ".jsonl":
        write_atomically(path, [json.dumps(row(one)) for one in trajectories], "the trajectories")
    elif path.suffix == ".parquet":
        _write_parquet(path, [row(one) for one in trajectories])
    else:
        raise ConfigError(f"{path}: trajectories are written as .jsonl or .parquet; use one of these suffixes")


def row(trajectory: Trajectory) -> dict[str, Any]:
    """One row of a JSONL file."""
    check(trajectory)
    functions = [
        {"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)}
        for spec in trajectory.tools
    ]
    known = {
        "task_id": trajectory.task_id,
        "correct": trajectory.correct,
        "spent": [trajectory.spent.read, trajectory.spent.written],
        "versions": {spec.name: spec.version for spec in trajectory.tools if spec.version},
        "segments": [[s.agent, s.kind, s.trained, len(s.text)] for s in trajectory.segments],
    }
    return {
        "messages": messages(trajectory),
        "tools": json.dumps([{"type": "function", "function": function} for function in functions]),
        EXTRA: json.dumps(known),
    }


def messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The conversation in OpenAI's form."""
    found: list[dict[str, Any]] = [{"role": "user", "content": trajectory.problem}]
    if trajectory.system:
        found.insert(0, {"role": "system", "content": trajectory.system})
    made = 0
    for reply in replies(trajectory.segments):
        message: dict[str, Any] = {"role": "assistant", "content": content(reply.texts)}
        calls, first = reply.called(), made
        for call in calls:
            function = {"name": call.name, "arguments": dict(call.arguments)}
            message.setdefault("tool_calls", []).append(
                {"id": f"call_{made}", "type": "function", "function": function}
            )
            made += 1
        found.append(message)
        for number, seen in enumerate(reply.observations):
            if seen.agent == USER:
                found.append({"role": "user", "content": seen.text})
            else:
                answered = {"tool_call_id": f"call_{first + number}", "name": calls[number].name}
                found.append({"role": "tool", "content": seen.text, **answered})
    return found


def _write_parquet(path: Path, found: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for one in found:
        for call in (call for message in one["messages"] for call in message.get("tool_calls", [])):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    function = pa.struct([("name", pa.string()), ("arguments", pa.string())])
    call = pa.struct([("id", pa.string()), ("type", pa.string()), ("function", function)])
    names = ("role", "content", "tool_call_id", "name")
    message = pa.struct([*((name, pa.string()) for name in names), ("tool_calls", pa.list_(call))])
    schema = pa.schema([("messages", pa.list_(message)), ("tools", pa.string()), (EXTRA, pa.string())])
    with disk_errors(path, "the trajectories"), replaced(path) as file:
        pq.write_table(pa.Table.from_pylist(found, schema=schema), file)
