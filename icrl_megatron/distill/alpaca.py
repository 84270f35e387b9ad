"""Alpaca: `instruction`, `input`, `output`, and optionally `system` and `history` (pairs of message and reply)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icrl_megatron.distill.messages import of_messages
from icrl_megatron.distill.rows import BadRowError, Fields, list_of, text_of
from icrl_megatron.distill.trajectory import Trajectory

OBSERVATION = "<observation>"


def fits(columns: Sequence[str]) -> bool:
    return {"instruction", "output"} <= set(columns)


def read(rows: Sequence[Fields], task_id: str) -> Trajectory:
    """Raises BadRowError."""
    (fields,) = rows
    output = text_of(fields["output"], "`output`")
    if OBSERVATION in output:  # would be trained on as if the model had written the answers of tools
        raise BadRowError(f"the output holds {OBSERVATION} tags; set format=afm for this entry of warm_start.data")
    messages: list[dict[str, Any]] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": fields["system"]})
    for pair in list_of(fields.get("history"), "`history`"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRowError("`history` is not a list of [message, reply]; correct it, or delete the column")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": asked(fields)}, {"role": "assistant", "content": output}]
    return of_messages(messages, None, task_id)


def asked(fields: Fields) -> str:
    """The user's message: the instruction and, below it, the input."""
    parts = [text_of(fields.get(name), f"`{name}`") for name in ("instruction", "input")]
    return "\n".join(part for part in parts if part.strip())
