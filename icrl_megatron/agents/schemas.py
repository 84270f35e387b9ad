"""Checks arguments against the JSON schema of a tool. The schema of a server is not trusted: what a check costs is
bounded, and what could take forever is left to the server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from graphlib import CycleError, TopologicalSorter
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import extend
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from icrl_megatron.agents.tools import ToolSpec

MOST_CHECKS = 20_000
"""Keywords that are evaluated for the arguments of one call."""
SHOWN_CHARS = 300
"""Of an error that the model observes."""
_left: ContextVar[list[int]] = ContextVar("_left")
_Check = Callable[[Any, Any, Any, Any], Any]


class BadSchemaError(ValueError):
    """A schema that cannot be used; the message says why and begins with a verb."""


class _TooMuchError(Exception):
    """The arguments need more than MOST_CHECKS evaluations."""


def validator(spec: ToolSpec) -> Validator:
    """Raises BadSchemaError."""
    schema = spec.parameters
    try:
        Draft202012Validator.check_schema(schema)
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
        _check_references(schema)
    except SchemaError as error:
        raise BadSchemaError(f"is not a JSON schema ({error.message[:SHOWN_CHARS]})") from error
    except RecursionError as error:
        raise BadSchemaError("is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise BadSchemaError("has a text with half a surrogate pair") from error
    except BadSchemaError:
        raise
    except ValueError as error:
        raise BadSchemaError("has a number that JSON cannot hold") from error
    if not spec.by_server:
        return Draft202012Validator(schema)
    # Another `$schema` would bring back the keywords that are left out.
    found: Validator = _Lenient(_without_dialects(schema), registry=Registry())
    return found


def mistake(check: Validator, arguments: Mapping[str, Any]) -> str:
    """What is wrong with arguments, in words for the model; empty if nothing is."""
    _left.set([MOST_CHECKS])
    try:
        error = best_match(check.iter_errors(dict(arguments)))
    except (_TooMuchError, RecursionError):
        return "these arguments are too large to be checked"
    except (ArithmeticError, Unresolvable):
        return "these arguments cannot be checked"
    if error is None:
        return ""
    where = ".".join(map(str, error.absolute_path))
    return f"{f'{where}: ' if where else ''}{error.message[:SHOWN_CHARS]}"


def _check_references(schema: Any) -> None:
    """Raises BadSchemaError for references that leave the schema, have no target, or apply themselves to the same
    value again."""
    root = DRAFT202012.create_resource(schema)
    resolver, graph, waiting = Registry().resolver_with_root(root), dict[int, list[int]](), [root]
    while waiting:
        resource = waiting.pop()
        part = resource.contents
        if id(part) in graph or not isinstance(part, Mapping):
            continue
        if resource is not root and isinstance(part.get("$id"), str):
            raise BadSchemaError("has an `$id` inside")
        same = [*(one for name in ("allOf", "anyOf", "oneOf") for one in part.get(name, []))]
        same += part.get("dependentSchemas", {}).values()
        reference = part.get("$ref", part.get("$dynamicRef"))
        if reference is not None:
            shown = repr(reference)[:100]
            if not reference.startswith("#") or "$dynamicRef" in part:
                raise BadSchemaError(f"refers to {shown}, which is not a part of it")
            try:
                target = resolver.lookup(reference).contents
            except (Unresolvable, ValueError, TypeError, LookupError) as error:
                raise BadSchemaError(f"refers to {shown}, which it does not have") from error
            if not isinstance(target, Mapping | bool):
                raise BadSchemaError(f"refers to {shown}, which is no schema")
            same.append(target)
            waiting.append(DRAFT202012.create_resource(target))
        graph[id(part)] = [id(one) for one in same]
        waiting += resource.subresources()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise BadSchemaError("refers to itself without end") from error


def _without_dialects(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        named = ("$schema", "$id")
        return {k: _without_dialects(v) for k, v in schema.items() if not (k in named and isinstance(v, str))}
    return [_without_dialects(one) for one in schema] if isinstance(schema, list) else schema


def _counted(check: _Check) -> _Check:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        left = _left.get()
        left[0] -= 1
        if left[0] < 0:
            raise _TooMuchError
        yield from check(validator, value, instance, schema) or ()

    return counted


def _additional(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if "patternProperties" not in schema:
        yield from _ALL["additionalProperties"](validator, value, instance, schema) or ()


# Left out: regular expressions and comparisons of all pairs, which can take forever, and keywords that refuse more if
# others are left out.
_ALL: Mapping[str, _Check] = Draft202012Validator.VALIDATORS
_LEFT_OUT = (
    "pattern", "patternProperties", "uniqueItems", "not", "if", "contains", "unevaluatedItems", "unevaluatedProperties",
    "$dynamicRef",
)  # fmt: skip
_Lenient: Any = extend(
    Draft202012Validator,
    {name: _counted(check) for name, check in _ALL.items()}
    | dict.fromkeys(_LEFT_OUT, lambda *_: None)
    | {"oneOf": _counted(_ALL["anyOf"]), "additionalProperties": _counted(_additional)},
)
