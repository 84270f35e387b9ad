"""How text segments are written as the content of a message, and read back from it."""

from __future__ import annotations

from collections.abc import Sequence

from icrl_megatron.distill.rows import BadRowError
from icrl_megatron.distill.trajectory import ASSISTANT, THINK, Segment


def around(segment: Segment, inline: bool = False) -> tuple[str, str]:
    """The text before and after a segment. Thinking gets the white space that Qwen's chat templates give it, unless the
    format is `inline`, where it is a tag like any other."""
    if segment.kind == "answer":
        return "<answer>", "</answer>"
    if segment.agent == ASSISTANT:
        return "", ""
    if segment.agent == THINK and not inline:
        return "<think>\n", "\n</think>\n\n"
    return f"<{segment.agent}>", f"</{segment.agent}>"


def separator(before: str) -> str:
    """What stands between two parts of a reply."""
    return "\n" if before and not before.endswith("\n\n") else ""


def content(segments: Sequence[Segment]) -> str:
    """The content of one message."""
    text = ""
    for segment in segments:
        opening, closing = around(segment)
        text += f"{separator(text)}{opening}{segment.text}{closing}"
    return text


def plain_segments(text: str, trained: bool) -> list[Segment]:
    """The segments of a message whose author is not known: thinking at its beginning, and the rest."""
    found, text = [], text.strip()
    thought, closing, rest = text.removeprefix("<think>").partition("</think>")
    if text.startswith("<think>") and closing:
        found, text = [Segment(THINK, thought.strip(), "text", trained)], rest.strip()
    return [*found, Segment(ASSISTANT, text, "text", trained)] if text else found


def taken(text: str, begun: str, segment: Segment, chars: int) -> tuple[str, str]:
    """(text of a segment with this many characters at the beginning of `text`, the rest). `begun`: the content before
    it. Raises BadRowError if the segment is not there."""
    opening, closing = around(segment)
    opening = separator(begun) + opening
    body = text[len(opening) : len(opening) + chars]
    rest = text[len(opening) + len(body) :]
    if not text.startswith(opening) or len(body) != chars or not rest.startswith(closing):
        raise BadRowError("the column `trajectory` does not fit the messages; delete that column")
    return body, rest.removeprefix(closing)
