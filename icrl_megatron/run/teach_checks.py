"""Checks that the model of `model.init` and the warm start suit the task sets. Imports no torch."""

from __future__ import annotations

from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Teachable
from icrl_megatron.utils.errors import ConfigError


def check_teachable(settings: Settings) -> None:
    """Raises ConfigError if a task set without words or teacher is to be played by a tokenizer of words, or taught."""
    init, warm = settings.model.init, settings.warm_start
    others = [registry.of_source(source) for source in settings.tasks.sources]
    names = ", ".join(repr(one.name) for one in others if not isinstance(one, Teachable))
    if names and not settings.model.path and init is not None and init.tokenizer == "words":
        raise ConfigError(
            f"task set {names} has no vocabulary, so a tokenizer of words cannot be made for it: use the recipe "
            "any_text, or begin a new run with model.init.tokenizer=bytes warm_start.steps=0, or with model.path"
        )
    if names and warm.wanted and not warm.data:
        raise ConfigError(
            f"task set {names} has no teacher for the warm start: begin a new run with warm_start.steps=0, or with "
            "conversations in warm_start.data, or give the task set teacher() and vocabulary()"
        )
