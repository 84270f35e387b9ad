"""What reaches a terminal: text of models, environments, servers and files, with control characters made visible.

A terminal obeys what it is sent: sequences after ESC move the cursor, set the title, or fill the clipboard, and
bidirectional overrides show text in another order than it has. Every process of this program calls `guard` first, so
that whatever it prints (messages, warnings, tracebacks, what a library or a task prints) passes `printable`. Only the
consoles of `console.py` write control sequences, which are their own.
"""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Any, TextIO, cast

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but newline and tab, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings, overrides and isolates of direction
    "\u2028\u2029"  # separators of lines and paragraphs
    "\ud800-\udfff]"  # halves of characters, which no terminal can be sent
)


def printable(text: str) -> str:
    """The text with each control character as an escape (\\x1b, \\u202e); newlines and tabs stay."""
    return _UNSEEN.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _Guarded:
    """A text stream through `printable`. It says that it is no terminal, so that libraries write no colors to it."""

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
    """From now on stdout and stderr of this process show control characters. Calling it again does no harm."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, _Guarded):
            continue
        with contextlib.suppress(AttributeError, ValueError):  # a stream of a test, or of something around this program
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal's encoding lacks is no error
        setattr(sys, name, _Guarded(stream))


def unguarded(name: str) -> TextIO:
    """stdout or stderr itself, for who makes its text printable before."""
    stream = getattr(sys, name)
    return cast(TextIO, stream.unguarded if isinstance(stream, _Guarded) else stream)
