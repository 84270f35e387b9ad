"""Problems of OpenEnv servers, the form of their actions, and the text of their observations."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icrl_megatron.tasks.base import BadAnswer, shown
from icrl_megatron.tasks.datasets import id_range
from icrl_megatron.tasks.reply_forms import ActionForm, Json
from icrl_megatron.utils.errors import ConfigError

_MCP = ("Action", "CallToolAction", "ListToolsAction")
"""Titles of the schemas of servers whose actions are calls of MCP tools."""
_HIDDEN = ("metadata", "done", "reward")


async def action_form(answer: Any, call: Callable[[str, Json], Awaitable[Json]]) -> ActionForm:
    """The form of actions that a server's answer to GET /schema describes. Raises BadAnswer if it describes none."""
    schema = answer.get("action") if isinstance(answer, dict) else None
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        raise BadAnswer(f"GET /schema answered {shown(answer)}, which has no schema of actions; is it OpenEnv?")
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
