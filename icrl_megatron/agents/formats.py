"""How a reply writes tool calls and answers, and how the model sees a tool's answer: one class per format.

A task set chooses its format by name (`agent.format`); another format is a class and a line in FORMATS.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from icrl_megatron.agents.dialogue import Dialogue
from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.utils.errors import ConfigError

MOST_CALLS = 8
"""In one reply."""


@dataclass(frozen=True)
class ToolCalls:
    """The reply calls tools, in this order; each call gets its own answer."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class FinalAnswer:
    """The reply ends the attempt with this answer."""

    text: str


@dataclass(frozen=True)
class Malformed:
    """The reply holds a call that cannot be read. The model observes `problem`."""

    problem: str


Parsed = ToolCalls | FinalAnswer | Malformed | None
"""What a reply holds; None: neither a call nor an answer."""


class ToolFormat(Protocol):
    """One way to write calls and answers. `parse(render(x)) == x` for all calls and answers that `parse` returns."""

    dialogue: Dialogue
    """Where a reply stops, and how the model sees an answer."""
    tags: tuple[str, ...]
    """Texts with a meaning in this format. A tool's answer that contains them is changed (`harmless`)."""

    def instructions(self) -> str:
        """What the prompt says about the form of calls and answers."""
        ...

    def parse(self, reply: str) -> Parsed: ...

    def render(self, action: ToolCalls | FinalAnswer) -> str: ...


class Qwen3:
    """The form of Qwen's chat templates: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several in a reply
    if needed, and tool messages as answers. A reply without a call is the final answer: what <answer> tags hold if it
    has them, else the whole reply after its thinking.
    """

    tags: tuple[str, ...] = tuple(
        text for name in ("tool_call", "tool_response", "think") for text in (f"<{name}>", f"</{name}>")
    )

    def __init__(self, specs: Sequence[ToolSpec]) -> None:
        functions = [{"name": s.name, "description": s.description, "parameters": dict(s.parameters)} for s in specs]
        tools = json.dumps([{"type": "function", "function": function} for function in functions])
        self.dialogue = Dialogue(tools=tools, observation="tool")

    def instructions(self) -> str:
        return "Call tools as often as you need. When you know the answer, reply with <answer>the answer</answer>."

    def parse(self, reply: str) -> Parsed:
        said = reply.rpartition("</think>")[2]
        if "<think>" in said:
            return Malformed("The thinking is not closed: end it with </think>.")
        written = list(_between(said, "<tool_call>", "</tool_call>"))
        if said.count("<tool_call>") > len(written):
            return Malformed("A <tool_call> is not closed: end it with </tool_call>.")
        if len(written) > MOST_CALLS:
            return Malformed(f"There are {len(written)} calls in one reply; make at most {MOST_CALLS}.")
        if not written:
            answer = last_tagged(said, "answer")
            text = answer[1] if answer else said.replace("<answer>", "").replace("</answer>", "")
            return FinalAnswer(text.strip()) if text.strip() else None
        try:
            return ToolCalls(tuple(map(_json_call, written)))
        except ValueError as error:
            return Malformed(f"A call cannot be read: {error}.")

    def render(self, action: ToolCalls | FinalAnswer) -> str:
        if isinstance(action, FinalAnswer):
            return f"<answer>{action.text}</answer>"
        return "\n".join(f"<tool_call>\n{self._json(call)}\n</tool_call>" for call in action.calls)

    def _json(self, call: ToolCall) -> str:
        text = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
        for tag in self.tags:
            text = text.replace(tag, f"\\u003c{tag[1:]}")
        return text


class Tags:
    """Inline tags, as in Chain-of-Agents (arXiv 2508.13167): <search>words</search> calls the tool `search` with its
    one text argument, and <answer>text</answer> ends the attempt. The last complete tag counts. A reply stops at such
    a closing tag, and continues after the tool's answer in <observation> tags.
    """

    observation = "observation"
    line_break = "\n"
    """Between a tag and an observation."""

    def __init__(self, specs: Sequence[ToolSpec]) -> None:
        """Raises ConfigError for a tool that does not take exactly one text."""
        self._arguments = {spec.name: _only_text(spec) for spec in specs}
        names = (*self._arguments, "answer", self.observation)
        self.tags = tuple(text for name in names for text in (f"<{name}>", f"</{name}>"))
        self.dialogue = Dialogue(
            stop=tuple(f"</{name}>" for name in names[:-1]),
            observation="inline",
            before=f"{self.line_break}<{self.observation}>",
            after=f"</{self.observation}>{self.line_break}",
        )

    def instructions(self) -> str:
        calls = ", ".join(f"<{name}>{argument}</{name}>" for name, argument in self._arguments.items())
        return (
            f"Write {calls} to use a tool: its answer follows between <{self.observation}> tags. When you know the "
            "answer, write <answer>the answer</answer>."
        )

    def parse(self, reply: str) -> Parsed:
        tags = (*self._arguments, "answer")
        closed = {tag: found for tag in tags if (found := last_tagged(reply, tag))}
        if not closed:
            opened = next((tag for tag in tags if f"<{tag}>" in reply), None)
            return Malformed(f"The tag <{opened}> is not closed: end it with </{opened}>.") if opened else None
        tag = max(closed, key=lambda name: closed[name][0])
        text = closed[tag][1].strip()
        return FinalAnswer(text) if tag == "answer" else ToolCalls((ToolCall(tag, {self._arguments[tag]: text}),))

    def render(self, action: ToolCalls | FinalAnswer) -> str:
        if isinstance(action, FinalAnswer):
            return f"<answer>{action.text}</answer>"
        (call,) = action.calls
        return f"<{call.name}>{call.arguments[self._arguments[call.name]]}</{call.name}>"


class SearchR1(Tags):
    """Search-R1's tags (arXiv 2503.09516): as `Tags`, with observations in <information> tags."""

    observation = "information"
    line_break = "\n\n"


FORMATS: dict[str, Callable[[Sequence[ToolSpec]], ToolFormat]] = {"qwen3": Qwen3, "tags": Tags, "search_r1": SearchR1}


def make_format(name: str, specs: Sequence[ToolSpec]) -> ToolFormat:
    """Raises ConfigError for an unknown name, and for tools that the format cannot write."""
    if name not in FORMATS:
        raise ConfigError(f"agent.format={name}: must be one of {', '.join(FORMATS)}")
    return FORMATS[name](specs)


def harmless(text: str, tags: Sequence[str]) -> tuple[str, int]:
    """(text of a tool with a space in each of the format's tags, number of tags changed): "<answer>" -> "< answer>". So
    the model never sees a tag that it or the runtime did not write."""
    found = re.findall("|".join(map(re.escape, tags)), text)
    for tag in set(found):
        text = text.replace(tag, f"< {tag[1:]}")
    return text, len(found)


def _json_call(text: str) -> ToolCall:
    """Raises ValueError, worded for the model."""
    try:
        found = json.loads(text, parse_constant=_refuse, parse_float=finite)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it has half a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from error
    match found:
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name, arguments)
    raise ValueError('it must have the form {"name": "...", "arguments": {...}}')


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def finite(number: str) -> float:
    """A number of JSON with a fraction or an exponent. Raises ValueError for one that would be infinite."""
    found = float(number)
    if math.isinf(found):
        raise ValueError(f"{number[:80]} is too large a number")
    return found


def _only_text(spec: ToolSpec) -> str:
    properties = spec.parameters.get("properties", {})
    texts = [name for name, schema in properties.items() if schema.get("type") == "string"]
    if len(properties) != 1 or not texts:
        raise ConfigError(
            f"tool {spec.name!r} takes {list(properties)}, but a tag holds one text; set agent.format=qwen3"
        )
    return texts[0]


def _between(text: str, opening: str, closing: str) -> Iterator[str]:
    """What each pair of tags holds, in one pass."""
    start = text.find(opening)
    while start >= 0:
        end = text.find(closing, start)
        if end < 0:
            return
        yield text[start + len(opening) : end]
        start = text.find(opening, end)


def last_tagged(text: str, tag: str) -> tuple[int, str] | None:
    """(end, content) of the last complete <tag>...</tag>, found in one pass, however many tags are open."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return (end, text[start + len(tag) + 2 : end]) if start >= 0 else None
