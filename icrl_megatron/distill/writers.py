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

from icrl_megatron.agents.formats import Qwen3, ToolCalls, harmless
from icrl_megatron.agents.tools import ToolSpec
from icrl_megatron.distill.check import check, replies
from icrl_megatron.distill.messages import EXTRA
from icrl_megatron.distill.trajectory import USER, Trajectory
from icrl_megatron.distill.written import content, separator
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import replaced, write_atomically
from icrl_megatron.utils.result_files import begins_with

SUFFIXES = (".jsonl", ".parquet")
_BETWEEN_ANSWERS = "\n</tool_response>\n<tool_response>\n"
"""As Qwen's chat templates separate the answers to the calls of one message."""


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


def written_here(path: Path) -> bool:
    """Whether a file looks like one of `write`."""
    if path.suffix == ".jsonl":
        return begins_with(b'{"messages"')(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return {"messages", "tools", EXTRA} == set(pq.read_schema(path).names)
    except (pa.ArrowInvalid, OSError):
        return False


def row(trajectory: Trajectory) -> dict[str, Any]:
    """One row of a JSONL file."""
    check(trajectory)
    known = {
        "task_id": trajectory.task_id,
        "correct": trajectory.correct,
        "spent": [trajectory.spent.read, trajectory.spent.written],
        "versions": {spec.name: spec.version for spec in trajectory.tools if spec.version},
        "segments": [[s.agent, s.kind, s.trained, len(s.text)] for s in trajectory.segments],
    }
    return {
        "messages": messages(trajectory),
        "tools": json.dumps([{"type": "function", "function": _function(spec)} for spec in trajectory.tools]),
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


def write_sharegpt(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Writes a .jsonl file of `sharegpt` rows, whole or not at all. Raises as `write`."""
    write_atomically(path, [json.dumps(sharegpt(one)) for one in trajectories], "the conversations")


def sharegpt(trajectory: Trajectory) -> dict[str, Any]:
    """A row for trainers that keep only the calls of a message with calls: here calls are a part of its text, as Qwen's
    chat templates write them, and the answers to calls are one text. `icrl sft` does not read it."""
    check(trajectory)
    form = Qwen3(trajectory.tools)
    turns = [{"from": "human", "value": trajectory.problem}]
    for reply in replies(trajectory.segments):
        said = content(reply.texts)
        if reply.calls:
            said += separator(said) + form.render(ToolCalls(reply.called()))
        turns.append({"from": "gpt", "value": said})
        seen = reply.observations
        if seen and seen[0].agent == USER:
            turns.append({"from": "human", "value": seen[0].text})
        elif seen:
            texts = [harmless(one.text, form.tags)[0] for one in seen]
            turns.append({"from": "observation", "value": _BETWEEN_ANSWERS.join(texts)})
    if turns[-1]["from"] != "gpt":
        turns.pop()
    functions = [_function(spec) for spec in trajectory.tools]
    return {"conversations": turns, "system": trajectory.system, "tools": json.dumps(functions) if functions else ""}


def _function(spec: ToolSpec) -> dict[str, Any]:
    return {"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)}


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
