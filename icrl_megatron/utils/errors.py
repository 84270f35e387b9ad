"""The two errors that end the program with one message and no traceback, and the one that costs an episode."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

OWN_ENTRY = "tasks.sources[...]"
"""What messages of a task set call its entry of `tasks.sources`, because it does not know its index (`own_entry`)."""


class ConfigError(ValueError):
    """A setting, file or grid is wrong: the message names it, its value and the remedy. The process exits with 2."""


class HopelessError(RuntimeError):
    """A run cannot continue, and restarting it would not help; the message is complete. The process exits with 1."""


class EnvironmentFailure(RuntimeError):
    """The infrastructure behind an environment failed, not the model: the episode is dropped and counted."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6, most: int = 1) -> str:
    """A remedy for an unknown name: the nearest of the known ones (at most `most`), or `otherwise` if none is near."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


@contextmanager
def own_entry(index: int) -> Iterator[None]:
    """Within it, the message of a ConfigError names this entry of `tasks.sources` in place of `OWN_ENTRY`, so that the
    setting in the message can be pasted."""
    try:
        yield
    except ConfigError as error:
        error.args = (str(error).replace(OWN_ENTRY, f"tasks.sources.{index}"), *error.args[1:])
        raise
