"""Allowed values, declared on the fields of the settings: a range of a number, or the choices of a text. No torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

SCHEDULES = ("constant", "linear", "cosine", "wsd")
"""Functions of algo/schedules.py."""

FAMILIES = ("qwen3", "qwen2")
"""Names of model/families.py, which imports torch."""

LOSSES = ("icrl", "gspo", "cispo")
"""Names that `algo.loss` takes: functions of algo/losses.py, which imports torch."""

TRACKERS = ("wandb", "mlflow", "trackio")
"""Names that `trackers.names` may hold: modules of telemetry/."""

RANGE, CHOICES = "range", "choices"
"""Keys of a field's metadata."""


def limited(default: float | None, low: float, high: float = math.inf) -> Any:
    """A field whose number is in [low, high]. Null is in range where the field's type allows it."""
    return dataclasses.field(default=default, metadata={RANGE: (low, high)})


def chosen(default: str, *choices: str) -> Any:
    """A field that takes one of a few texts."""
    return dataclasses.field(default=default, metadata={CHOICES: choices})
