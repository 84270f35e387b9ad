"""Recipes: functions that return `Settings`. `icrl recipes` lists them and `icrl train NAME` runs one."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction
from typing import Any

from icrl_megatron.settings.schema import Settings


def registry() -> dict[str, Callable[[], Settings]]:
    """Name -> function, in the order of the list: the public functions of `tiny` and `files`, then the table of
    `qwen3`.

    Imports neither torch nor NeMo-Run.
    """
    from icrl_recipes import files, qwen3, tiny

    functions = {**vars(tiny), **vars(files)}.items()
    own: dict[str, Any] = {
        name: value
        for name, value in functions
        if isfunction(value) and name[0] != "_" and value.__module__ in (tiny.__name__, files.__name__)
    }
    return own | {recipe.__name__: recipe for recipe in qwen3.RECIPES}
