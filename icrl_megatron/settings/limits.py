"""The allowed values of all settings by dotted name, read off their fields (`allowed.py`). Imports no torch."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from icrl_megatron.settings import allowed
from icrl_megatron.settings.schema import Settings


def fields(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting below a class: (dotted name, without numbers of list elements; its field)."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        inner = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if inner is None:
            yield name, field
        else:
            yield from fields(typing.cast(type, inner), f"{name}.")


def _declared(kind: str) -> dict[str, Any]:
    return {name: field.metadata[kind] for name, field in fields(Settings) if kind in field.metadata}


CHOICES: dict[str, tuple[str, ...]] = _declared(allowed.CHOICES)
"""Settings that name one of a few things."""

RANGES: dict[str, tuple[float, float]] = _declared(allowed.RANGE)
"""Smallest and largest value of each number."""
