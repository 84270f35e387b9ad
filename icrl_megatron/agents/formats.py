"""How a reply writes a tool call or an answer: one class per format, and one line in FORMATS."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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


class Qwen3:
    """The form of Qwen2.5's and Qwen3's chat templates: JSON in <tool_call>. A reply without a call is the answer."""

    def __init__(self, specs: Sequence[ToolSpec]) -> None:
        self._specs = specs

    def instructions(self) -> str:
        listed = "\n".join(json.dumps(spec.function(), ensure_ascii=False) for spec in self._specs)
        return (
            f"You may call these tools:\n<tools>\n{listed}\n</tools>\n"
            'Write a call as <tool_call>\n{"name": <name>, "arguments": <JSON object>}\n</tool_call>\n'
            "One call a turn. Reply without a call to give your answer."
        )

    def parse(self, reply: str) -> Parsed:
        inside = _last(reply, "tool_call")
        if inside is None:
            if "<tool_call>" in reply:
                return Malformed("The call is not closed: end it with </tool_call>.")
            text = reply.rpartition("</think>")[2].strip()
            return FinalAnswer(text) if text else None
        try:
            call = json.loads(inside)
        except (ValueError, RecursionError):
            return Malformed("The text between <tool_call> and </tool_call> is no JSON.")
        if not (isinstance(call, dict) and isinstance(call.get("name"), str)):
            return Malformed('A call is a JSON object with "name" and "arguments".')
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return Malformed('"arguments" must be a JSON object.')
        return ToolCall(call["name"], arguments)

    def render(self, action: ToolCall | FinalAnswer) -> str:
        if isinstance(action, FinalAnswer):
            return action.text
        body = json.dumps({"name": action.name, "arguments": action.arguments}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"


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
            return None
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
        raise ConfigError(f"tool {spec.name!r} takes {list(properties)}: a tag holds one text; use the format qwen3")
    return texts[0]


FORMATS: dict[str, Callable[[Sequence[ToolSpec]], ToolFormat]] = {"qwen3": Qwen3, "tags": Tags}


def _last(text: str, tag: str) -> str | None:
    """What the last complete <tag>...</tag> holds, in one pass however many tags are open."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end] if start >= 0 else None
