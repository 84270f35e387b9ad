"""The two errors that end the program with one message and no traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, file or grid is wrong: the message names it, its value and the remedy. The process exits with 2."""


class HopelessError(RuntimeError):
    """A run cannot continue, and restarting it would not help; the message is complete. The process exits with 1."""
