"""The two errors that end the program with one message and without a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting, file or grid is wrong: the message names it, its value and the remedy. The process exits with 2."""


class HopelessError(RuntimeError):
    """A run cannot go on, now or when it is started again, and the message says all of it. The process exits with 1."""
