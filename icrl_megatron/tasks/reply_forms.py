"""How a reply becomes the action of another package's environment: text, a JSON object of its schema, or tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jsonschema.protocols import Validator

from icrl_megatron.agents import schemas
from icrl_megatron.agents.formats import FinalAnswer, Malformed, Parsed, Qwen3, ToolCalls
from icrl_megatron.agents.tools import ToolSpec
from icrl_megatron.tasks.base import BadAnswer

Json = dict[str, Any]
EMPTY = "The reply is empty."
_CALLS = Qwen3(())


@dataclass(frozen=True)
class ActionForm:
    """How a reply of the model becomes an action."""

    text_field: str = ""
    """The only field of an action, if that is text."""
    schema: Json = field(default_factory=dict)
    """JSON schema of actions with other fields."""
    check: Validator | None = None
    """Checks actions against `schema`."""
    tools: tuple[Json, ...] = ()
    """MCP tools whose calls are the actions. Their server checks the arguments."""

    @staticmethod
    def of_schema(schema: Json) -> ActionForm:
        """Raises BadAnswer for a schema that cannot be used, such as one that refers to another address."""
        try:
            check = schemas.validator(ToolSpec("action", "", schema, by_server=True))
        except schemas.BadSchemaError as error:
            raise BadAnswer(f"the environment has a schema of actions that {error}") from error
        return ActionForm(schema=schema, check=check)

    def instructions(self) -> str:
        if self.tools:
            return offered(self.tools).strip()
        if self.text_field:
            return ""
        wanted = json.dumps(self.schema, ensure_ascii=False)
        return f"Reply with your reasoning, if you like, and then with one JSON object of this schema:\n{wanted}"

    def problem(self, reply: str) -> str:
        """What keeps a reply from being an action, in words for the model; empty if nothing does."""
        if self.tools:
            return call_problem(reply, several=False)
        if not reply.strip():
            return EMPTY
        if self.text_field:
            return ""
        made = last_object(reply)
        if made is None:
            return "There is no JSON object in the reply."
        wrong = schemas.mistake(self.check, made) if self.check is not None else ""
        return f"The JSON object is not valid: {wrong}." if wrong else ""

    def action(self, reply: str) -> Json | None:
        """The action of a reply without a problem; None: the model ends the attempt."""
        if self.tools:
            found, _ = calls_of(reply)
            if not isinstance(found, ToolCalls):
                return None
            call = found.calls[0]
            return {"type": "call_tool", "tool_name": call.name, "arguments": dict(call.arguments)}
        return {self.text_field: reply.strip()} if self.text_field else last_object(reply)


def offered(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the prompt says about tools and the form of calls; nothing without tools."""
    if not tools:
        return ""
    form = '<tool_call>{"name": "...", "arguments": {...}}</tool_call>'
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return f"\n\nTools:\n{listed}\n\nTo call one, write {form}. A reply without a call is your answer."


def calls_of(reply: str) -> tuple[Parsed, str]:
    """(the tool calls of a reply, the text before them)."""
    found = _CALLS.parse(reply)
    if isinstance(found, FinalAnswer | Malformed | None):
        return found, reply
    return found, reply.partition("<tool_call>")[0].strip()


def call_problem(reply: str, several: bool = True) -> str:
    """What is wrong with a reply that may have tool calls, in words for the model; empty if nothing is. `several`:
    whether it may have more than one."""
    if not reply.strip():
        return EMPTY
    found, _ = calls_of(reply)
    if isinstance(found, ToolCalls) and len(found.calls) > 1 and not several:
        return "There are several calls in one reply; make one."
    return found.problem if isinstance(found, Malformed) else ""


def last_object(reply: str) -> Json | None:
    """The last JSON object in a text that is not inside of another one; None without any."""
    decoder, found, at = json.JSONDecoder(), None, reply.find("{")
    for _ in range(1000):  # a reply of braces must not take quadratic time
        if at < 0:
            break
        try:
            made, end = decoder.raw_decode(reply, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            found = made
        at = reply.find("{", end)
    return found
