"""Replies as sequences of agents: role-playing agents write tagged text, tool agents are calls.

In the reply `<plan> home size </plan> <search> p 4 8 3 </search>`, one model plays two agents (Chain-of-Agents, arXiv
2508.13167). `icrl show` and `icrl report` show each agent in its own color.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal
from zlib import crc32

from icrl_megatron.types import Episode

TaggedKind = Literal["text", "call", "answer"]

ROLES = ("think", "plan", "reflection", "suggested_answer", "double_check", "check")
ANSWER = "answer"
TOOL_CALL = "tool_call"
"""Qwen's tag around a call: its JSON names the tool."""
SEARCHES = ("search", "wiki_search", "web_search", "crawl_page")
"""Tools that are always recognized. Others, such as <page> or <code>, are recognized where an environment read a call
from them, because these tags may also be ordinary text."""

PALETTE = (
    *("#909c00", "#6c48fc", "#fc3090", "#00786c", "#307848"),
    *("#3ca854", "#309cd8", "#f000b4", "#8478fc", "#786c0c"),
)
"""Contrast of at least 3:1 on the light and the dark page, and on a white and a black terminal. Any two differ with
normal vision, protanopia and deuteranopia: their CIE76 distance is 20 or more (tests/cpu/test_segments.py)."""
_PLACES = {name: place for place, name in enumerate((*ROLES[:5], ANSWER))} | {"check": 4}
_PLACES |= {"search": 6, "wiki_search": 6, "web_search": 6, "page": 7, "crawl_page": 7}
_PLACES |= {"code": 8, "python": 8, "calculator": 9}

_TAG = re.compile(r"<(/?)([A-Za-z_][A-Za-z0-9_-]{0,63})>")
_CALL = re.compile(r"<([A-Za-z_][A-Za-z0-9_-]{0,63})>")
_NAME_CHARS = 64


@dataclass(frozen=True)
class TaggedText:
    """A part of a reply that one agent wrote, with its tags.

    Example: TaggedText("search", "<search> p 4 8 3 </search>", "call")
    """

    agent: str
    """The tag, or the tool that a <tool_call> names; empty for text outside of tags."""
    text: str
    kind: TaggedKind


@dataclass(frozen=True)
class _Tag:
    name: str
    closes: bool
    start: int
    end: int


def split(reply: str, tools: Collection[str] = ()) -> tuple[TaggedText, ...]:
    """The segments of a reply, in order; joined, their texts are the reply. Takes time linear in its length.

    Tags: `ROLES`, `ANSWER`, `TOOL_CALL`, `SEARCHES` and `tools`. Where tags are nested, the inner one counts. A closed
    call or answer holds plain text. An unclosed one ends at the next tag; an unclosed role ends with the tag around it.
    """
    known = {*ROLES, ANSWER, TOOL_CALL, *SEARCHES, *tools}
    tags = [_Tag(m[2], bool(m[1]), m.start(), m.end()) for m in _TAG.finditer(reply) if m[2] in known]
    closed = _closed(tags)
    # A chat template may have opened <think> in the prompt.
    stack = ["think"] if tags and tags[0].name == "think" and tags[0].closes else []
    depth = Counter(stack)
    found: list[TaggedText] = []
    begun, inside = 0, ""

    def end(place: int) -> None:
        nonlocal begun
        if place > begun:
            found.append(_segment(stack[-1] if stack else "", reply[begun:place]))
        begun = place

    for number, tag in enumerate(tags):
        if inside and tag.name != inside:
            continue
        if not tag.closes:
            end(tag.start)
            if stack and stack[-1] not in ROLES:
                depth[stack.pop()] -= 1
            stack.append(tag.name)
            depth[tag.name] += 1
            inside = tag.name if number in closed and tag.name not in ROLES else ""
        elif depth[tag.name]:
            end(tag.end)
            while (top := stack.pop()) != tag.name:
                depth[top] -= 1
            depth[tag.name] -= 1
            inside = ""
    end(len(reply))
    return tuple(found)


def _closed(tags: list[_Tag]) -> set[int]:
    """The places of opening tags whose next tag of the same name closes them."""
    following: dict[str, bool] = {}
    found = set()
    for number in range(len(tags) - 1, -1, -1):
        tag = tags[number]
        if not tag.closes and following.get(tag.name):
            found.add(number)
        following[tag.name] = tag.closes
    return found


def _segment(name: str, text: str) -> TaggedText:
    if name == TOOL_CALL:
        return TaggedText(_called(text), text, "call")
    if name == ANSWER:
        return TaggedText(name, text, "answer")
    return TaggedText(name, text, "text" if name in ROLES or not name else "call")


def _called(text: str) -> str:
    """The tool that the JSON of a <tool_call> names, or `TOOL_CALL` if it cannot be read."""
    try:
        name = json.loads(text.removeprefix(f"<{TOOL_CALL}>").removesuffix(f"</{TOOL_CALL}>"))["name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return TOOL_CALL
    return name if isinstance(name, str) and 0 < len(name) <= _NAME_CHARS else TOOL_CALL


def tools_of(episodes: Iterable[Episode]) -> frozenset[str]:
    """The tags from which the episodes' environment read calls: an action that is a call is written as its tag."""
    actions = (turn.action or "" for e in episodes for attempt in e.attempts for turn in attempt.turns)
    names = {m[1] for action in actions if (m := _CALL.match(action)) and action.endswith(f"</{m[1]}>")}
    return frozenset(names - {*ROLES, ANSWER, TOOL_CALL})


def colors(agents: Iterable[str]) -> Mapping[str, str]:
    """A color of `PALETTE` for each agent, independent of their order. A well-known agent (`_PLACES`) always has the
    same color, except where two that share one are present. Colors repeat only if there are more agents than colors."""
    found: dict[str, str] = {}
    for name in sorted({*agents} - {""}, key=lambda name: (name not in _PLACES, name)):
        wanted = _PLACES.get(name, crc32(name.encode("utf-8", "backslashreplace"))) % len(PALETTE)
        turned = PALETTE[wanted:] + PALETTE[:wanted]
        used = set(found.values())
        found[name] = next((color for color in turned if color not in used), turned[0])
    return found
