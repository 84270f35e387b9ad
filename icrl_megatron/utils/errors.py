"""The two errors that end the program with one message and no traceback, and the one that costs an episode."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, file or grid is wrong: the message names it, its value and the remedy. The process exits with 2."""


class HopelessError(RuntimeError):
    """A run cannot continue, and restarting it would not help; the message is complete. The process exits with 1."""


class EnvironmentFailure(RuntimeError):
    """The infrastructure behind an environment failed, not the model: the episode is dropped and counted."""
