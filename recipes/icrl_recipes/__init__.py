"""Recipes: plain functions that return `Settings`. What one adds, `icrl recipes` lists and `icrl train NAME` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import getmembers, isfunction
from types import ModuleType

from icrl_megatron.settings.schema import Settings


def registry() -> dict[str, Callable[[], Settings]]:
    """Name -> function, in the order in which they are listed. Imports no torch, and nothing of NeMo-Run."""
    from icrl_recipes import ablations, baselines, paper, scale, tiny

    modules = (tiny, paper, scale, baselines, ablations)
    return {function.__name__: function for module in modules for function in _public(module)}


def _public(module: ModuleType) -> Iterator[Callable[[], Settings]]:
    """The recipes that a module defines, in the order of its lines."""
    own = [f for name, f in getmembers(module, isfunction) if f.__module__ == module.__name__ and name[0] != "_"]
    yield from sorted(own, key=lambda function: function.__code__.co_firstlineno)
