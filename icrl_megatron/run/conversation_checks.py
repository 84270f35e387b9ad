"""Checks of the settings of supervised training on files (`warm_start.data`). Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

from icrl_megatron.distill import readers
from icrl_megatron.distill.rows import SUFFIXES
from icrl_megatron.settings.loading import YAML
from icrl_megatron.settings.schema import ConversationFiles, Settings, WarmStart
from icrl_megatron.utils.errors import ConfigError

NEED_DATA = ("epochs", "heldout", "max_tokens")
"""Settings that only say something about `warm_start.data`."""

DATA_RECIPE = "sft"
"""The recipe of `icrl sft DATA`."""


def as_recipe(given: str, recipes: Container[str]) -> tuple[str, list[str]]:
    """The argument of `icrl sft` as a recipe and overrides: a file, folder or pattern becomes the data of DATA_RECIPE,
    in a run that is named after it; anything else is a recipe."""
    path = Path(given)
    if given in recipes or path.suffix in YAML or not (path.suffix in SUFFIXES or "*" in given or path.exists()):
        return given, []
    words = (re.sub(r"[^\w.-]+", "_", part).strip("_.") for part in (path.stem, path.resolve().parent.name))
    name = next(filter(None, words), DATA_RECIPE)
    return DATA_RECIPE, [f"name={name}", f"warm_start.data.0.path={given}"]


def check_settings(settings: Settings) -> None:
    """Raises ConfigError for a combination that cannot work."""
    warm = settings.warm_start
    for name in NEED_DATA if not warm.data else ():
        if getattr(warm, name):
            raise ConfigError(
                f"warm_start.{name}={getattr(warm, name)} needs conversations: set "
                f"warm_start.data=[{{path: FILE}}], or leave warm_start.{name} out"
            )
    if warm.steps > 0 and warm.epochs is not None:
        raise ConfigError(
            f"warm_start.steps={warm.steps} has no effect with warm_start.epochs={warm.epochs:g}: set "
            "warm_start.epochs=null or warm_start.steps=0 in a new run"
        )
    if warm.patience is not None and not warm.heldout:
        raise ConfigError(
            f"warm_start.patience={warm.patience} needs a held-out loss: set warm_start.heldout, e.g. to 0.02, or "
            "leave warm_start.patience out"
        )
    for i, entry in enumerate(warm.data):
        if not entry.path:
            raise ConfigError(f"warm_start.data.{i}.path is empty: name a file, e.g. warm_start.data=[{{path: FILE}}]")
        tool_format(settings, entry)
    fraction(warm)


def check_files(warm: WarmStart) -> None:
    """Reads the first row of every file. Raises ConfigError for a missing file and an unknown format."""
    for entry in warm.data:
        readers.detect(entry.path, entry.format)
    if warm.heldout and fraction(warm) is None:
        readers.detect(warm.heldout, warm.data[0].format)


def tool_format(settings: Settings, entry: ConversationFiles) -> str:
    """How calls of the entry are written. Raises ConfigError if the task sets do not agree on a format."""
    formats = sorted({source.call_format for source in settings.tasks.sources})
    if not entry.tool_format and len(formats) > 1:
        raise ConfigError(
            f"warm_start.data has no tool_format for {entry.path}, and the task sets use several "
            f"({', '.join(formats)}): set tool_format of each entry of warm_start.data"
        )
    return entry.tool_format or formats[0]


def fraction(warm: WarmStart) -> float | None:
    """The held-out share of the problems; None if `warm_start.heldout` is a path or empty. Raises ConfigError for a
    number that is no share."""
    try:
        share = float(warm.heldout)
    except ValueError:
        return None
    if not 0.0 < share < 1.0:
        raise ConfigError(f"warm_start.heldout={warm.heldout}: give a fraction between 0 and 1, or a file")
    return share
