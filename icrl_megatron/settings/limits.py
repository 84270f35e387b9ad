"""Ranges and choices of settings. They are written in the annotation of the field: `Annotated[int, Range(1)]`.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of a number. Null is also allowed if the type of the field includes None."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.low:.12g}" if self.high == math.inf else f"{self.low:.12g} to {self.high:.12g}"

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError if `value` of the setting `name` is outside the range."""
        if value is None or (math.isfinite(value) and self.low <= value <= self.high):
            return
        bound = f"at least {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"
        raise ConfigError(f"{name}={value}: must be a finite number, {bound}")


@dataclass(frozen=True)
class Choice:
    """The texts that a setting may have; for a list, the texts that it may contain."""

    names: tuple[str, ...]
    other: str = ""
    """What else the setting accepts, such as "package.module:function". The code that uses the setting checks it."""

    def __str__(self) -> str:
        return ", ".join(name or "''" for name in (*self.names, *([self.other] if self.other else [])))

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError if `value` of the setting `name` is not a choice."""
        if isinstance(value, list):
            for one in value:
                if one not in self.names:
                    raise ConfigError(f"{name} has {one}: choose from {self}")
        elif value is not None and value not in self.names and not self.other:
            raise ConfigError(f"{name}={value}: choose one of {self}")


Limit = Range | Choice


@functools.cache
def limits_of(section: type) -> Mapping[str, Limit]:
    """Field -> its range or choices, for the fields of one dataclass that have any."""
    found = {}
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        for note in getattr(hint, "__metadata__", ()):
            if isinstance(note, Range | Choice):
                found[name] = note
    return found


def check_limits(section: Any, prefix: str = "") -> None:
    """Raises ConfigError if a field of `section` (a dataclass), or of a section inside it, is outside of its range or
    choices. `prefix` precedes the names in messages: "rollout."."""
    limits = limits_of(section.__class__)
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        if field.name in limits:
            limits[field.name].check(name, value)
        elif dataclasses.is_dataclass(value):
            check_limits(value, f"{name}.")
        elif isinstance(value, list):
            for i, element in enumerate(value):
                if dataclasses.is_dataclass(element):
                    check_limits(element, f"{name}.{i}.")
