"""Problems of OpenEnv servers, from a reply to an action, and from an observation to text."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonschema.protocols import Validator

from icrl_megatron.agents import schemas
from icrl_megatron.agents.formats import Malformed, ToolCalls
from icrl_megatron.agents.tools import ToolSpec
from icrl_megatron.tasks.base import BadAnswer, shown
from icrl_megatron.tasks.datasets import id_range
from icrl_megatron.tasks.package_environment import calls_of, offered
from icrl_megatron.utils.errors import ConfigError

Json = dict[str, Any]
_MCP = ("Action", "CallToolAction", "ListToolsAction")
"""Titles of the schemas of servers whose actions are calls of MCP tools."""
_HIDDEN = ("metadata", "done", "reward")


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
            raise BadAnswer(f"GET /schema answered a schema of actions that {error}") from error
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
        if not reply.strip():
            return "The reply is empty."
        if self.tools:
            found, _ = calls_of(reply)
            if isinstance(found, ToolCalls) and len(found.calls) > 1:
                return "There are several calls in one reply; make one."
            return found.problem if isinstance(found, Malformed) else ""
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


async def action_form(schemas: Any, call: Callable[[str, Json], Awaitable[Json]]) -> ActionForm:
    """The form of actions that a server's answer to GET /schema describes. Raises BadAnswer if it describes none."""
    schema = schemas.get("action") if isinstance(schemas, dict) else None
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        raise BadAnswer(f"GET /schema answered {shown(schemas)}, which has no schema of actions; is it OpenEnv?")
    if schema.get("title") in _MCP:
        listed = (await call("step", {"type": "list_tools"})).get("observation", {}).get("tools")
        if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed) or not listed:
            raise BadAnswer(f"a list_tools was answered with {shown(listed)}, which names no tools")
        return ActionForm(tools=tuple({**tool, "parameters": tool.get("input_schema", {})} for tool in listed))
    fields = {name: value for name, value in schema["properties"].items() if name not in _HIDDEN}
    needed = [name for name in schema.get("required", fields) if name in fields]
    only = fields[needed[0]] if len(fields) == len(needed) == 1 else None
    if isinstance(only, dict) and only.get("type") == "string" and not {"enum", "const", "pattern"} & set(only):
        return ActionForm(text_field=needed[0])
    return ActionForm.of_schema({**schema, "properties": fields})


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


def observation_text(answer: Mapping[str, Any], fields: Sequence[str]) -> str:
    """The fields of an observation that are not empty: one text alone, several with their names."""
    observation = answer.get("observation")
    if not isinstance(observation, dict):
        raise BadAnswer(f"the server answered {shown(answer)}, which has no observation; is it a server of OpenEnv?")
    chosen = fields or [name for name in observation if name not in _HIDDEN]
    given = {name: observation.get(name) for name in chosen}
    kept = {
        name: value
        for name, value in given.items()
        if value is not None and value != "" and value != [] and value != {}
    }
    texts = {n: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for n, v in kept.items()}
    return next(iter(texts.values())) if len(texts) == 1 else "\n".join(f"{n}: {text}" for n, text in texts.items())


def reset_arguments(given: str) -> list[dict[str, Any]]:
    """The arguments of reset that one entry of `data.train` or `data.heldout` names. Raises ConfigError."""
    if (seeds := id_range(given)) is not None:
        return [{"seed": seed} for seed in seeds]
    path = Path(given)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{given}: neither a range of seeds like 0:900 nor a file ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: a line is not JSON ({error}); each is an object of arguments of reset") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f'{path}: each row must be an object of arguments of reset, e.g. {{"seed": 7}}')
    return rows
