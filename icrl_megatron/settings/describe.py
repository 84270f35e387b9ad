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
from icrl_megatron.settings.task_options import SOURCES
from icrl_megatron.settings.task_schema import TaskSource

INTRODUCTION = """# Settings

Written by `icrl settings --markdown`; a test compares this page with it. Any setting can be given on the command line
as `NAME=VALUE`, for example `icrl train quickstart steps=10`. Elements of lists have a number:
`tasks.sources.0.weight=2`. Options of task sets begin with the names of those that have them.

The type of a setting decides what its value means, on the command line and in a saved `settings.yaml`. Integers and
numbers are decimal: `seed=010` is 10, and `0x10`, `1_000` and `1:30` are refused. Text is what you type, so
`name=010`, `name=no` and the range in `[1:20]` stay as they are; quote text in a list that has `,`, `[`, `{`, `: ` or
`#` in it. `null` is null where the type allows it. Put single quotes around an override with brackets or spaces:
`'tasks.sources.0.data.train=[a.jsonl, b.jsonl]'`. A refusal ends with an override that you can paste.
`icrl --install-completion` makes your shell complete the names of recipes and settings.
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
    task_sets: tuple[str, ...] = ()
    """Those that have this option; empty if it is no option of a task set."""

    @property
    def allowed(self) -> str:
        """The limit in words; empty if there is none."""
        any_of = "any of " if isinstance(self.limit, Choice) and self.kind.startswith("list") else ""
        return f"{any_of}{self.limit or ''}"

    @property
    def meaning(self) -> str:
        """The help, with the task sets that it applies to."""
        return f"{', '.join(self.task_sets)}: {self.help}" if self.task_sets else self.help

    def __str__(self) -> str:
        allowed = f"; {self.allowed}" if self.allowed else ""
        return f"{self.name}={self.default}  ({self.kind}{allowed})" + (f"\n    {self.meaning}" if self.help else "")


def described(prefix: str = "") -> list[Setting]:
    """All settings below a dotted prefix (or the one of that name), in the order of their declaration."""
    return [s for s in _walk(Settings(), "") if s.name == prefix or s.name.startswith(f"{prefix}." if prefix else "")]


def markdown() -> str:
    """The page docs/SETTINGS.md."""
    parts, section = [INTRODUCTION], None
    for setting in described():
        begins = setting.name.rpartition(".")[0]
        if begins != section:
            section = begins
            parts.append(f"\n## {section or 'The run'}\n\n{HEADER}")
        cells = (f"`{setting.name}`", setting.kind, setting.default, setting.allowed, setting.meaning)
        parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def _walk(section: Any, prefix: str) -> Iterator[Setting]:
    """The settings of a section whose values are defaults."""
    cls: type = type(section)
    helps, hints, limits = _helps(cls), typing.get_type_hints(cls), limits_of(cls)
    for field in dataclasses.fields(cls):
        name, hint, value = prefix + field.name, hints[field.name], getattr(section, field.name)
        inner: Any = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if inner is TaskSource:
            yield from _walk(TaskSource(), f"{name}.0.")
            yield from _options(f"{name}.0.")
        elif inner is None:
            yield Setting(name, _kind(hint), _default(value), limits.get(field.name), helps.get(field.name, ""))
        elif isinstance(value, list):
            yield from _walk(inner(), f"{name}.0.")
        else:
            yield from _walk(value if value is not None else inner(), f"{name}.")


def _options(prefix: str) -> list[Setting]:
    """The options of all task sets, each with the task sets that have it, section by section."""
    found: dict[Setting, list[str]] = {}
    for task_set, cls in SOURCES.items():
        for setting in _walk(cls(), prefix):
            if setting not in _walk(TaskSource(), prefix):
                found.setdefault(setting, []).append(task_set)
    names = list(dict.fromkeys(setting.name for setting in found))
    sections = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    order = sorted(found, key=lambda s: (sections.index(s.name.rpartition(".")[0]), names.index(s.name)))
    return [dataclasses.replace(setting, task_sets=tuple(found[setting])) for setting in order]


@functools.cache
def _helps(cls: type) -> dict[str, str]:
    """Field -> the docstring below it, in the class or a base of it."""
    found = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (body,) = [n.body for n in ast.parse(inspect.getsource(base)).body if isinstance(n, ast.ClassDef)]
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _kind(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value) or "''"
