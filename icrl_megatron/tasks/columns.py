"""Which columns of a row are its prompt and its label, and both as text.

A column is a dotted path (`reward_model.ground_truth`) through objects, or through JSON text of objects. Where a row
lacks the columns of the settings' defaults, the columns of verl, TRL, slime, OpenAI, ShareGPT and of common plain rows
are recognized."""

from __future__ import annotations

import datetime
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from icrl_megatron.settings.task_sections import Rows
from icrl_megatron.types import Split
from icrl_megatron.utils.errors import ConfigError

Fields = Mapping[str, Any]
_PROMPTS = ("prompt", "problem", "question", "query", "instruction", "messages", "conversations")
_LABELS = ("label", "answer", "final_answer", "ground_truth", "reward_model.ground_truth", "extra_info.answer")
_SOLUTIONS = ("solution", "target", "output", "response", "completion")
"""Columns that are labels only where a row has none of the others."""
_CONVERSATIONS = ("messages", "conversations")
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "system": "system",
    "developer": "system",
    "gpt": "assistant",
    "assistant": "assistant",
}
_WRITTEN = re.compile(
    r"(?:array\()?[\[(\s]*(?:\{\s*['\"]\w+['\"]\s*:(?=.*['\"](?:role|from)['\"]\s*:)|\{\s*['\"]role['\"]\s*:"
    r"|\{\s*'(?:content|value)'\s*:|[A-Za-z]\w*\(role=)",
    re.S,
)
"""How text begins that a program wrote of messages. Only JSON of a list of messages is read."""
_PYTHON_TEXT = re.compile(r"b'.*'|b\".*\"|[\[(]\s*(?:'[^']*'|\"[^\"]*\")\s*,?\s*[\])]", re.S)
"""Python's notation of bytes, and of a list with one text."""
_PYTHON_LABEL = re.compile(r"b'.*'|b\".*\"|\[\s*'.*'\s*\]", re.S)
MISSING = object()


@dataclass(frozen=True)
class Columns:
    prompt: str
    label: str
    """Empty: the last message of the prompt's conversation, which the assistant wrote."""
    recognized: bool = False
    more: str = ""
    """A column whose text follows the prompt where it is not empty: the `input` of instruction rows."""

    def described(self) -> str:
        label = f"column {self.label}" if self.label else "its last assistant message"
        prompt = f"columns {self.prompt} and {self.more}" if self.more else f"column {self.prompt}"
        return f"prompt = {prompt}, label = {label}"


def columns_of(fields: Fields, data: Rows, split: Split, where: str) -> Columns:
    """The columns of a file, by its first row. Raises ConfigError if they cannot be told."""
    prompt, label = data.prompt_column, data.label_column
    if split == "heldout":
        prompt, label = data.heldout_prompt_column or prompt, data.heldout_label_column or label
    defaults = (prompt, label) == (Rows.prompt_column, Rows.label_column)
    if not defaults or (_found(fields, prompt) and _found(fields, label)):
        return Columns(prompt, label)
    prompt = _only(fields, _PROMPTS, where, split, "prompt_column")
    if prompt in _CONVERSATIONS and not any(_found(fields, name) for name in (*_LABELS, *_SOLUTIONS)):
        return Columns(prompt, "", recognized=True)
    group = _LABELS if any(_found(fields, name) for name in _LABELS) else _SOLUTIONS
    more = "input" if prompt == "instruction" and isinstance(fields.get("input"), str) else ""
    return Columns(prompt, _only(fields, group, where, split, "label_column"), recognized=True, more=more)


def _only(fields: Fields, names: Sequence[str], where: str, split: Split, setting: str) -> str:
    """The one column of these that a row has. Raises ConfigError if it has none or several."""
    found = [name for name in names if _found(fields, name)]
    if len(found) == 1:
        return found[0]
    kind = setting.removesuffix("_column")
    several = f"{', '.join(found)} may each be the {kind}" if found else f"no column is known as the {kind}"
    prefix = "heldout_" if split == "heldout" else ""
    example = found[0] if found else next(iter(fields), "COLUMN")
    raise ConfigError(
        f"{where}: {several}; the columns are {', '.join(_paths(fields)) or 'none'}; name it, e.g. "
        f"'tasks.sources[...].data.{prefix}{setting}={example}'"
    )


def _paths(fields: Fields) -> list[str]:
    nested = {name: value for name, value in fields.items() if isinstance(value, Mapping)}
    return [*fields, *(f"{name}.{key}" for name, value in nested.items() for key in value)]


def _found(fields: Fields, column: str) -> bool:
    return at_path(fields, column) is not MISSING


def at_path(fields: Fields, column: str) -> Any:
    """What is at a dotted path; MISSING if nothing is. A column whose own name has dots comes first."""
    if column in fields:
        return fields[column]
    value: Any = fields
    for name in column.split("."):
        if isinstance(value, str):
            value = _json(value)
        if not isinstance(value, Mapping) or name not in value:
            return MISSING
        value = value[name]
    return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Texts:
    prompt: str
    label: str
    system: str = ""
    """What the row's system messages say; empty: it has none, or they are a part of the prompt."""


def texts(fields: Fields, columns: Columns, where: str, split: Split, join: bool = False) -> Texts:
    """The prompt and the label of a row. `join`: system messages are the first paragraph of the prompt. Raises
    ConfigError if the prompt or the label is missing, empty, or no text."""
    value = _named(fields, columns.prompt, where, split, "prompt_column")
    at = f"{where}: column {columns.prompt!r}"
    if columns.label:
        label = _label(
            _named(fields, columns.label, where, split, "label_column"), f"{where}: column {columns.label!r}"
        )
        prompt, system = _prompt(value, at, join, answered=columns.prompt in _CONVERSATIONS)
        if columns.more and (further := fields.get(columns.more)):
            prompt = f"{prompt}\n\n{_prompt(further, f'{where}: column {columns.more!r}', join)[0]}"
        return Texts(prompt, label, system)
    messages = _messages(value)
    if messages is None or len(messages) < 2 or _role(messages[-1]) != "assistant":
        raise ConfigError(
            f"{at} does not end with an assistant message, which would be the label; fix or delete the row"
        )
    prompt, system = _prompt(messages[:-1], at, join)
    return Texts(prompt, _label(_content(messages[-1], at), at), system)


def subset(fields: Fields, column: str, where: str) -> str:
    """The value of `data.subset_column`, as a part of a name. Raises ConfigError if it is missing or empty."""
    value = at_path(fields, column)
    name = "" if value is MISSING or isinstance(value, list | dict) else _scalar(value, where).strip()
    if not name:
        raise ConfigError(
            f"{where}: no text in column {column!r} of data.subset_column; there are {', '.join(_paths(fields))}"
        )
    return re.sub(r"[^\w.-]+", "_", name)


def _named(fields: Fields, column: str, where: str, split: Split, setting: str) -> Any:
    value = at_path(fields, column)
    if value is MISSING:
        prefix = "heldout_" if split == "heldout" else ""
        raise ConfigError(
            f"{where}: no column {column!r}, there are {', '.join(_paths(fields)) or 'none'}; give "
            f"'tasks.sources[...].data.{prefix}{setting}=COLUMN' with one of them"
        )
    return value


def _prompt(value: Any, at: str, join: bool, answered: bool = False) -> tuple[str, str]:
    """(prompt, system message). `answered`: whether a conversation may end with the assistant's answer, which is left
    out."""
    if (messages := _messages(value)) is not None:
        if answered and len(messages) > 1 and _role(messages[-1]) == "assistant":
            messages = messages[:-1]
        return _spoken(messages, at, join)
    if not isinstance(value, str):
        what = "empty" if value is None else f"{type(value).__name__} ({value!r:.60})"
        raise ConfigError(f"{at} is {what}; a prompt is text or a list of chat messages: fix or delete the row")
    if not value.strip():
        raise ConfigError(f"{at} is empty ({value!r}); fix or delete the row")
    if _WRITTEN.match(value) or _PYTHON_TEXT.fullmatch(value.strip()):
        raise ConfigError(
            f"{at} is data that a program wrote as text; write the text alone, or messages as a JSON list with role "
            f"and content: {value:.60}"
        )
    return value, ""


def _messages(value: Any) -> list[Mapping[str, Any]] | None:
    """Chat messages in a list, or in JSON text of one; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = _json(value)
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return value if all({"content", "value"} & set(one) for one in value) else None
    return None


def _role(message: Mapping[str, Any]) -> str:
    given = message.get("role", message.get("from", "user"))
    return _SPEAKERS.get(given, str(given)) if isinstance(given, str) else str(given)


def _content(message: Mapping[str, Any], at: str) -> str:
    """The text of a message, whose parts are joined."""
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        kinds = {str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in parts}
        if other := sorted(kinds - {"text"}):
            raise ConfigError(f"{at} has a message with parts of type {', '.join(other)}; only text can be asked")
        if wrong := [part for part in parts if not isinstance(part.get("text", ""), str)]:
            raise ConfigError(f"{at} has a message with the part {wrong[0]!r:.60}, whose text is none; fix the row")
        content = "".join(part.get("text", "") for part in parts)
    if not isinstance(content, str):
        raise ConfigError(f"{at} has a message whose content is {content!r:.60}, not text; fix or delete the row")
    return content


def _spoken(messages: Sequence[Mapping[str, Any]], at: str, join: bool) -> tuple[str, str]:
    """(what the user says, what the system messages before it say); with `join`, all of it as the former."""
    roles = [_role(message) for message in messages]
    if unknown := sorted(set(roles) - {"system", "user"}):
        raise ConfigError(
            f"{at}: a prompt with messages of {', '.join(unknown)}; only system and user messages are allowed; remove "
            "the others"
        )
    if "user" not in roles:
        raise ConfigError(f"{at} has no user message; fix or delete the row")
    begins = 0 if join else roles.index("user")
    if "system" in roles[begins:] and not join:
        raise ConfigError(
            f"{at} has a system message after a user message, where few chat templates show one; move it to the "
            "beginning, or give 'tasks.sources[...].data.system=join'"
        )
    said = [_content(message, at) for message in messages]
    text = "\n\n".join(said[begins:])
    if not text.strip():
        raise ConfigError(f"{at} is empty; fix or delete the row")
    return text, "\n\n".join(said[:begins]).strip()


def _label(value: Any, at: str) -> str:
    """A label as text. Messages of the assistant, as TRL's conversational completions are, are what they say."""
    messages = _messages(value) if isinstance(value, list) else None
    if messages is not None and {_role(message) for message in messages} == {"assistant"}:
        value = "\n\n".join(_content(message, at) for message in messages)
    if isinstance(value, dict | list | tuple):
        text = _listed(value, at) if value else ""
    else:
        text = _scalar(value, at)
    if not text.strip():
        raise ConfigError(f"{at} is empty ({value!r}); fix or delete the row")
    if _PYTHON_LABEL.fullmatch(text.strip()):
        raise ConfigError(f"{at} is Python's notation of bytes or a list; write text, or JSON of a list: {text:.60}")
    return text


def _listed(value: Any, at: str) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=lambda one: _scalar(one, at))
    parts = [one if isinstance(one, dict) else _scalar(one, at) for one in value]
    return json.dumps(parts, ensure_ascii=False, default=lambda one: _scalar(one, at))


def _scalar(value: Any, at: str) -> str:
    """Numbers without the noise of their storage; bytes as UTF-8; dates as YYYY-MM-DD."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{at} has bytes that are not UTF-8 ({value!r:.60}); write text") from error
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{at} is {'NaN' if math.isnan(value) else 'infinite'}; fix or delete the row")
        return str(int(value)) if value.is_integer() else _shortest(value)
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    if isinstance(value, datetime.date):
        return value.isoformat()
    return str(value)


def _shortest(value: float) -> str:
    """0.1 for what a float32 column holds for it, 0.10000000149011612."""
    for digits in range(1, 10):
        short = f"{value:.{digits}g}"
        if struct.unpack("f", struct.pack("f", float(short)))[0] == value:
            return short if len(repr(value)) > len(short) + 5 else repr(value)
    return repr(value)
