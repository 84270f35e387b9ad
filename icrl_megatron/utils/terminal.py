"""Escapes control characters in everything that this program prints: text of models, environments, servers and files.

A terminal executes ESC sequences, which move the cursor, set the title, or fill the clipboard; bidirectional overrides
change the order in which text is shown. Every process of this program calls `guard` first, so that all its output
(messages, warnings, tracebacks, output of libraries and tasks) goes through `printable`. Only the consoles of
`console.py` write control sequences of their own.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Any, TextIO, cast

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but newline and tab, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings, overrides and isolates of direction
    "\u2028\u2029"  # line and paragraph separators
    "\ud800-\udfff]"  # surrogates, which cannot be encoded
)


def printable(text: str) -> str:
    """Replaces each control character with an escape (\\x1b, \\u202e); newlines and tabs stay."""
    return _UNSEEN.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _Guarded:
    """A text stream that applies `printable`. `isatty` is False, so that libraries write no colors to it."""

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        self.unguarded.write(printable(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


def guard() -> None:
    """Makes stdout and stderr of this process escape control characters. Idempotent."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, _Guarded):
            continue
        with contextlib.suppress(AttributeError, ValueError):  # a stream that a test or an embedding program replaced
            stream.reconfigure(errors="backslashreplace")  # characters outside the terminal's encoding are no error
        setattr(sys, name, _Guarded(stream))


def unguarded(name: str) -> TextIO:
    """stdout or stderr without the guard, for callers that already escape their text."""
    stream = getattr(sys, name)
    return cast(TextIO, stream.unguarded if isinstance(stream, _Guarded) else stream)
