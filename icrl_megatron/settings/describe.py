"""Every setting with its type, default, allowed values and help: for `icrl settings` and docs/SETTINGS.md. No torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from icrl_megatron.settings.limits import Choice, Limit, limits_of
from icrl_megatron.settings.schema import Settings

INTRODUCTION = """# Settings

Written by `icrl settings --markdown`; a test compares this page with it. Any setting can be given on the command line
as `NAME=VALUE`, for example `icrl train quickstart steps=10`. Elements of lists have a number:
`tasks.sources.0.weight=2`.
"""
HEADER = "| setting | type | default | allowed | meaning |\n| --- | --- | --- | --- | --- |\n"


@dataclass(frozen=True)
class Setting:
    name: str
    """Dotted."""
    kind: str
    """Its type as it is declared."""
    default: str
    limit: Limit | None
    """Choices or range; None if every value of the type is allowed."""
    help: str

    @property
    def allowed(self) -> str:
        """The limit in words; empty if there is none."""
        any_of = "any of " if isinstance(self.limit, Choice) and self.kind.startswith("list") else ""
        return f"{any_of}{self.limit or ''}"

    def __str__(self) -> str:
        allowed = f"; {self.allowed}" if self.allowed else ""
        return f"{self.name}={self.default}  ({self.kind}{allowed})" + (f"\n    {self.help}" if self.help else "")


def described(prefix: str = "") -> list[Setting]:
    """All settings below a dotted prefix (or the one of that name), in the order of their declaration."""
    return [s for s in _walk(Settings, "") if s.name == prefix or s.name.startswith(f"{prefix}." if prefix else "")]


def markdown() -> str:
    """The page docs/SETTINGS.md."""
    parts, section = [INTRODUCTION], None
    for setting in described():
        begins = setting.name.rpartition(".")[0]
        if begins != section:
            section = begins
            parts.append(f"\n## {section or 'The run'}\n\n{HEADER}")
        cells = (f"`{setting.name}`", setting.kind, setting.default, setting.allowed, setting.help)
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def _walk(cls: type, prefix: str) -> Iterator[Setting]:
    helps, hints, limits = _helps(cls), typing.get_type_hints(cls), limits_of(cls)
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        inner = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if inner is None:
            yield Setting(name, _kind(hint), _default(field), limits.get(field.name), helps.get(field.name, ""))
        else:
            number = ".0" if typing.get_origin(hint) is list else ""
            yield from _walk(typing.cast(type, inner), f"{name}{number}.")


@functools.cache
def _helps(cls: type) -> dict[str, str]:
    """Field -> the docstring below it."""
    (body,) = [n.body for n in ast.parse(inspect.getsource(cls)).body if isinstance(n, ast.ClassDef)]
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _kind(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value) or "''"
