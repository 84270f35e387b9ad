"""The two errors that end the program with one message and no traceback, and the one that costs an episode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

OWN_ENTRY = "tasks.sources[...]"
"""What messages of a task set call its entry of `tasks.sources`, because it does not know its index (`own_entry`)."""


class ConfigError(ValueError):
    """A setting, file or grid is wrong: the message names it, its value and the remedy. The process exits with 2."""


class HopelessError(RuntimeError):
    """A run cannot continue, and restarting it would not help; the message is complete. The process exits with 1."""


class EnvironmentFailure(RuntimeError):
    """The infrastructure behind an environment failed, not the model: the episode is dropped and counted."""


@contextmanager
def own_entry(index: int) -> Iterator[None]:
    """Within it, the message of a ConfigError names this entry of `tasks.sources` in place of `OWN_ENTRY`, so that the
    setting in the message can be pasted."""
    try:
        yield
    except ConfigError as error:
        error.args = (str(error).replace(OWN_ENTRY, f"tasks.sources.{index}"), *error.args[1:])
        raise
