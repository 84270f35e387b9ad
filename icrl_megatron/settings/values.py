"""From the text of a setting to its value, by the declared type of the setting alone.

YAML only gives the structure of lists and mappings. Its scalars are read here, because YAML 1.1 takes 010 for 8, 1:30
for 90 and `no` for false, whatever the type of the setting. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from icrl_megatron.settings.task_options import source_class
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.utils.errors import ConfigError

_BOOLS = {"true": True, "yes": True, "on": True, "y": True, "1": True}
_BOOLS |= {"false": False, "no": False, "off": False, "n": False, "0": False}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NO_DEFAULT = object()
_MOST_FIXES = 16
"""A remedy corrects at most this many mistakes in one value."""


@dataclass(eq=False)
class _Mistake(Exception):
    """One part of a value that does not have the declared type. `fixed` replaces the text from `start` to `end`, with
    the same meaning or as an example; None: nothing is known that would be right there."""

    name: str
    text: str
    expected: str
    start: int
    end: int
    fixed: str | None
    is_example: bool = False


def pasted(name: str, value: str) -> str:
    """The override `name=value`, quoted for a shell where that is needed."""
    return shlex.quote(f"{name}={value}")


def parse(name: str, raw: str, hint: Any, current: Any = _NO_DEFAULT) -> Any:
    """The value of the override `name=raw` for a setting of type `hint`. What a text setting gets is kept as typed,
    unless it is quoted. Lists and mappings are YAML; mappings for sections are returned as dicts.

    Raises ConfigError with an override that can be pasted, if one is known. `current`: the value that the setting has,
    for an example.
    """
    if "${" in raw or raw == "???":
        raise ConfigError(
            f"{name}={raw}: ${{...}} and ??? mean something to OmegaConf and are not values; leave it out"
        )
    try:
        return _read(name, raw, hint, current)
    except yaml.YAMLError as error:
        remedy = "put quotation marks around text with special characters, and close all brackets"
        if plain := re.fullmatch(r"\[([^][{}\"']*)\]", raw):  # such as [*.jsonl]
            quoted = [json.dumps(word.strip(), ensure_ascii=False) for word in plain[1].split(",")]
            if right := _corrected(name, f"[{', '.join(quoted)}]", hint, current):
                remedy = f"write {pasted(name, right)}"
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{name}={raw}: cannot be read ({reason}); expected {describe(hint)}; {remedy}") from error
    except _Mistake as mistake:
        fixed = None if mistake.fixed is None else raw[: mistake.start] + mistake.fixed + raw[mistake.end :]
        right = None if fixed is None else _corrected(name, fixed, hint, current)
        listed = re.sub(r"\.\d+", ".0", re.sub(r"\.\d+$", "", mistake.name))
        remedy = f"`icrl settings {listed}` explains it" if right is None else f"write {pasted(name, right)}"
        if right is not None and mistake.is_example:
            remedy = f"e.g. {pasted(name, right)}"
        raise ConfigError(f"{mistake.name}={mistake.text}: expected {mistake.expected}; {remedy}") from mistake


def parse_file(text: str, hint: type) -> Any:
    """The same for a whole YAML file of a section such as `Settings`. Raises ConfigError, and yaml.YAMLError."""
    node = _compose(text)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("not a mapping of settings")
    try:
        return _from_node(node, hint, "", text, _NO_DEFAULT)
    except _Mistake as mistake:
        raise ConfigError(f"{mistake.name}={mistake.text}: expected {mistake.expected}") from mistake


def describe(hint: Any) -> str:
    """What a setting of this type accepts, in words."""
    plain = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    if hint in plain:
        return plain[hint]
    if dataclasses.is_dataclass(hint):
        return "values for " + ", ".join(field.name for field in dataclasses.fields(hint))
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return f"a list, each element with {describe(arguments[0])}"
    if typing.get_origin(hint) is dict:
        return "a mapping {name: value}"
    return " or ".join(describe(argument) for argument in arguments) if arguments else str(hint)


def _read(name: str, raw: str, hint: Any, current: Any) -> Any:
    scalars = all(option in (int, float, bool, str, types.NoneType) for option in _options(hint))
    if scalars and raw[:1] not in ("'", '"'):
        return _scalar(name, raw, hint, False, (0, len(raw)), current)
    return _from_node(_compose(raw or "''"), hint, name, raw, current)


def _compose(text: str) -> Any:
    try:
        node = yaml.compose(text, yaml.BaseLoader)
    except RecursionError as error:
        raise yaml.YAMLError("too many brackets inside each other") from error
    if node is None:
        raise yaml.YAMLError("it is empty or only a comment")
    return node


def _corrected(name: str, raw: str, hint: Any, current: Any) -> str | None:
    """`raw` with its other mistakes corrected as well, or None if one has no correction."""
    for _ in range(_MOST_FIXES):
        try:
            _read(name, raw, hint, current)
            return raw
        except yaml.YAMLError:
            return None
        except _Mistake as mistake:
            if mistake.fixed is None:
                return None
            raw = raw[: mistake.start] + mistake.fixed + raw[mistake.end :]
    return None


def _from_node(node: Any, hint: Any, name: str, raw: str, default: Any) -> Any:
    options = _options(hint)
    if Any in options:
        return _untyped(node)
    start, end = node.start_mark.index, min(node.end_mark.index, len(raw))
    text = raw[start:end].strip()

    def wrong(fixed: str | None) -> _Mistake:
        return _Mistake(name, text, describe(hint), start, start + len(text), fixed)

    lists = next((option for option in options if typing.get_origin(option) is list), None)
    dicts = next((option for option in options if typing.get_origin(option) is dict), None)
    section = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if isinstance(node, yaml.SequenceNode):
        if lists is None:
            raise wrong(json.dumps(text, ensure_ascii=False) if str in options else _shown(default))
        element = typing.get_args(lists)[0]
        return [_from_node(one, element, f"{name}.{i}", raw, _NO_DEFAULT) for i, one in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        if section is not None:
            return _section(node, typing.cast(type, section), name, raw)
        if dicts is not None:
            element = typing.get_args(dicts)[1]
            return {k: _from_node(v, element, f"{name}.{k}", raw, _NO_DEFAULT) for k, v in _items(node, name)}
        if lists is not None and dataclasses.is_dataclass(typing.get_args(lists)[0]):
            raise wrong(f"[{text}]")
        quoted = json.dumps(text, ensure_ascii=False)
        raise wrong(f"[{quoted}]" if lists is not None else quoted if str in options else _shown(default))
    quoted_text = node.style in ("'", '"')
    if node.value == "null" and not quoted_text and types.NoneType in options:
        return None
    if not (lists or dicts or section):
        return _scalar(name, node.value, hint, quoted_text, (start, start + len(text)), default)
    if lists is not None:
        raise wrong(_as_list(text, typing.get_args(lists)[0]))
    named = re.fullmatch(r"([A-Za-z_]\w*)[=:]\s*(\S.*)", text)
    raise wrong(f"{{{named[1]}: {named[2]}}}" if dicts is not None and named else None)


def _untyped(node: Any) -> Any:
    """A value whose type only a user's own class knows: numbers, truth values and null where they are not quoted."""
    if isinstance(node, yaml.SequenceNode):
        return [_untyped(one) for one in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key: _untyped(value) for key, value in _items(node, "")}
    text = node.value
    if node.style in ("'", '"'):
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else {"true": True, "false": False, "null": None}.get(text, text)


def _section(node: Any, section: type, name: str, raw: str) -> dict[str, Any]:
    """The values of a section. Settings that it does not have are kept as they are; the caller names them."""
    items = dict(_items(node, name))
    if issubclass(section, TaskSource) and isinstance(items.get("name"), yaml.ScalarNode):
        section = source_class(items["name"].value)
    hints, fields = typing.get_type_hints(section), {f.name: f for f in dataclasses.fields(section)}
    found = {}
    for key, value in items.items():
        if key in fields:
            at = f"{name}.{key}" if name else key
            found[key] = _from_node(value, hints[key], at, raw, fields[key].default)
        else:
            _check_space(key, value, name, raw)
            found[key] = _plain(value)
    return found


def _check_space(key: str, value: Any, name: str, raw: str) -> None:
    """Raises _Mistake for {name:value}, which YAML takes for one name."""
    inner = re.fullmatch(r"(\w+):(\S.*)", key)
    if inner and getattr(value, "value", None) == "":
        start = raw.rindex(key, 0, value.start_mark.index + len(key))
        fixed = f"{inner[1]}: {inner[2]}"
        raise _Mistake(name, key, "a space after the colon", start, start + len(key), fixed)


def _items(node: Any, name: str) -> Iterator[tuple[str, Any]]:
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value in seen:
            text = getattr(key, "value", key)
            raise ConfigError(f"{name}: {text} is given twice or is not a name; give each name once")
        seen.add(key.value)
        yield key.value, value


def _plain(node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(one) for one in node.value]
    return {k: _plain(v) for k, v in _items(node, "")} if isinstance(node, yaml.MappingNode) else node.value


def _scalar(name: str, text: str, hint: Any, quoted: bool, at: tuple[int, int], default: Any) -> Any:
    """A number, truth value, text or None. Raises _Mistake for text of another type, and for unquoted text that could
    be several of them."""
    options = _options(hint)
    if options == (str,) or (quoted and str in options):
        return text
    if str in options:  # also a truth value
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        if yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False)) == "tag:yaml.org,2002:str":
            return text
    elif text == "null" and types.NoneType in options:
        return None
    elif bool in options and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    elif int in options and _INTEGER.fullmatch(text):
        return int(text)
    elif float in options and _NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    fixed = _near(text, options)
    raise _Mistake(name, text, describe(hint), *at, _shown(default) if fixed is None else fixed, fixed is None)


def _near(text: str, options: tuple[Any, ...]) -> str | None:
    """What `text` means in the notation of other languages, written as a value of one of the types."""
    if types.NoneType in options and text.lower() in ("", "~", "none", "null"):
        return "null"
    if str in options:
        word = text.lower()
        return str(_BOOLS[word]).lower() if word in _BOOLS and not word.isdigit() else json.dumps(text)
    digits = text.replace("_", "") if re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)+", text) else text
    if re.fullmatch(r"[0-9]+,[0-9]*([eE][+-]?[0-9]+)?", text) and not re.fullmatch(r"[0-9]{1,3},[0-9]{3}", text):
        digits = text.replace(",", ".")
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,15}|0[oO][0-7]{1,18}|0[bB][01]{1,60}", text):
        digits = str(int(text, 0))
    if int in options and _NUMBER.fullmatch(digits) and float(digits).is_integer() and abs(float(digits)) < 1e15:
        return str(int(float(digits)))
    return digits if float in options and _NUMBER.fullmatch(digits) and math.isfinite(float(digits)) else None


def _shown(default: Any) -> str | None:
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "null"}[default]
    return repr(default) if isinstance(default, int | float) else None


def _as_list(text: str, element: Any) -> str:
    """The list with this one element, or without any if it is empty. An element that is a section gets it as the first
    of its settings."""
    if text in ("", "''"):
        return "[]"
    if dataclasses.is_dataclass(element):
        return f"[{{{dataclasses.fields(element)[0].name}: {text}}}]"
    return f"[{text}]" if re.fullmatch(r"[\w./:@%+=~-]+", text) else f"[{json.dumps(text, ensure_ascii=False)}]"


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
