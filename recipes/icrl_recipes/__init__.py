"""Recipes: plain functions that return `Settings`. What one adds, `icrl recipes` lists and `icrl train NAME` runs."""

from __future__ import annotations

from collections.abc import Callable

from icrl_megatron.config import Settings


def registry() -> dict[str, Callable[[], Settings]]:
    """Name -> function, in the order in which they are listed. Imports no torch."""
    from icrl_recipes import qwen3, tiny

    functions = (
        tiny.quickstart,
        tiny.rulebook_hard,
        tiny.rulebook_easy,
        tiny.household,
        qwen3.qwen3_4b,
        qwen3.qwen3_8b,
    )
    return {function.__name__: function for function in functions}
