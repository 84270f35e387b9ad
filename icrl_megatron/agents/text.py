"""Text that tools return to a model: without control characters, and bounded."""

from __future__ import annotations

CUT = "\n[... {left_out} characters left out ...]\n"


def plain(text: str) -> str:
    """Without control characters except newlines and tabs, and with question marks for lone surrogates."""
    one_kind = text.replace("\r\n", "\n")
    kept = "".join(c for c in one_kind if c in "\n\t" or not (c < " " or "\x7f" <= c <= "\x9f"))
    return kept.encode(errors="replace").decode()


def head(text: str, chars: int) -> str:
    """The first `chars` characters, and how many were left out."""
    return text if len(text) <= chars else text[:chars] + CUT.format(left_out=len(text) - chars).rstrip("\n")


def tail(text: str, chars: int) -> str:
    """The last `chars` characters, and how many were left out."""
    return (
        text if len(text) <= chars else CUT.format(left_out=len(text) - chars).lstrip("\n") + text[len(text) - chars :]
    )
