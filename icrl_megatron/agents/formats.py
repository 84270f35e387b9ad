"""How a reply writes a tool call or an answer: one class per format. A task set chooses its format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class FinalAnswer:
    """The reply ends the attempt with this answer."""

    text: str


@dataclass(frozen=True)
class Malformed:
    """The reply holds a call that cannot be read. The model observes `problem`."""

    problem: str


Parsed = ToolCall | FinalAnswer | Malformed | None
"""What a reply holds; None: neither a call nor an answer."""


class ToolFormat(Protocol):
    """One way to write calls and answers. `parse(render(x)) == x` for every call and answer that `parse` returns."""

    def instructions(self) -> str:
        """What the prompt says about the tools and the form of a call."""
        ...

    def parse(self, reply: str) -> Parsed: ...

    def render(self, action: ToolCall | FinalAnswer) -> str: ...


class Tags:
    """Inline tags, as in Search-R1 (arXiv 2503.09516) and Chain-of-Agents: <search>words</search> calls the tool
    `search` with its one text argument, and <answer>text</answer> ends the attempt. The last complete tag counts.
    """

    def __init__(self, specs: Sequence[ToolSpec]) -> None:
        """Raises ConfigError for a tool that does not take exactly one text."""
        self._arguments = {spec.name: _only_text(spec) for spec in specs}

    def instructions(self) -> str:
        calls = ", ".join(f"<{name}>{argument}</{name}>" for name, argument in self._arguments.items())
        return f"Reply with one of {calls}, or with <answer>the answer</answer>."

    def parse(self, reply: str) -> Parsed:
        ends = {tag: reply.rfind(f"</{tag}>") for tag in (*self._arguments, "answer") if _last(reply, tag) is not None}
        if not ends:
            opened = next((tag for tag in (*self._arguments, "answer") if f"<{tag}>" in reply), None)
            return Malformed(f"The tag <{opened}> is not closed: end it with </{opened}>.") if opened else None
        tag = max(ends, key=lambda name: ends[name])
        text = (_last(reply, tag) or "").strip()
        return FinalAnswer(text) if tag == "answer" else ToolCall(tag, {self._arguments[tag]: text})

    def render(self, action: ToolCall | FinalAnswer) -> str:
        if isinstance(action, FinalAnswer):
            return f"<answer>{action.text}</answer>"
        return f"<{action.name}>{action.arguments[self._arguments[action.name]]}</{action.name}>"


def _only_text(spec: ToolSpec) -> str:
    properties = spec.parameters.get("properties", {})
    texts = [name for name, schema in properties.items() if schema.get("type") == "string"]
    if len(properties) != 1 or not texts:
        raise ConfigError(f"tool {spec.name!r} takes {list(properties)}, but a tag holds one text; use another format")
    return texts[0]


def _last(text: str, tag: str) -> str | None:
    """What the last complete <tag>...</tag> holds, in one pass however many tags are open."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if start >= 0 else None
