"""The published data of Chain-of-Agents: a prompt, and one response with the whole tagged sequence.

    {"prompt": "...", "response": "<think>...</think><web_search>...</web_search><observation>...</observation>...
    <answer>...</answer>"}

The columns are `prompt` and `response`, or those of alpaca. A tag that an <observation> follows is a call with one text
argument; an observation is never trained on, wherever its text ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from icrl_megatron.agents.grammar import Grammar
from icrl_megatron.agents.tools import ToolCall, ToolSpec
from icrl_megatron.distill.alpaca import asked
from icrl_megatron.distill.rows import BadRowError, Fields, text_of
from icrl_megatron.distill.trajectory import ASSISTANT, Segment, Trajectory

ARGUMENTS = {"wiki_search": "query", "web_search": "query", "crawl_page": "url", "code": "code"}
"""Argument of the published tools; others get `text`."""
TOOLS = (*ARGUMENTS, "visual_inspector")
_NO_TOOLS = (*Grammar.roles, "answer")
_OPENING = re.compile(r"<([A-Za-z_]\w{0,40})>")


def fits(columns: Sequence[str]) -> bool:
    return {"prompt", "response"} <= set(columns)


def read(rows: Sequence[Fields], task_id: str) -> Trajectory:
    """Raises BadRowError."""
    (fields,) = rows
    if "response" in fields:
        problem, response = text_of(fields.get("prompt"), "`prompt`"), text_of(fields["response"], "`response`")
    elif "output" in fields:
        problem, response = asked(fields), text_of(fields["output"], "`output`")
    else:
        raise BadRowError("neither a column `response` nor `output`; name the format of this file")
    segments = segments_of(response)
    names = dict.fromkeys(segment.agent for segment in segments if segment.kind == "call")
    tools = tuple(ToolSpec.of_text(name, "", ARGUMENTS.get(name, "text")) for name in names)
    return Trajectory(task_id, problem, segments, system=text_of(fields.get("system"), "`system`"), tools=tools)


def segments_of(response: str) -> tuple[Segment, ...]:
    """The segments of a tagged sequence. Raises BadRowError for calls and observations that do not match, and for an
    observation that is not closed."""
    parts = tagged_parts(response)
    found: list[Segment] = []
    for number, (tag, body) in enumerate(parts):
        following = parts[number + 1][0] if number + 1 < len(parts) else ""
        if tag == "observation":
            if not found or found[-1].kind != "call":
                raise BadRowError("an observation without a call; delete it, or add its call")
            found.append(Segment(found[-1].agent, body, "observation", trained=False))
        elif following == "observation" and tag in _NO_TOOLS:
            raise BadRowError(f"an observation after <{tag}>, which is no call; delete it, or add its call")
        elif following == "observation" and tag:
            arguments = {ARGUMENTS.get(tag, "text"): body}
            found.append(Segment(tag, "", "call", call=ToolCall(tag, arguments)))
        elif tag in TOOLS:
            raise BadRowError(f"a call of {tag!r} without an answer; add its observation, or delete the call")
        elif tag == "answer":
            found.append(Segment(tag, body, "answer"))
        else:
            found.append(Segment(tag or ASSISTANT, body))
    return tuple(found)


def tagged_parts(text: str) -> list[tuple[str, str]]:
    """(tag, what it holds) in order; text between tags has no tag, and white space there is left out. An opening tag
    that nothing closes is text, unless it is that of an observation."""
    found, start, free = list[tuple[str, str]](), 0, ""
    closings: dict[str, int] = {}
    while match := _OPENING.search(text, start):
        tag = match[1]
        if closings.get(tag, 0) >= 0:  # -1: no closing tag is left, so that this takes linear time
            closings[tag] = text.find(f"</{tag}>", match.end())
        end = closings[tag]
        free += text[start : match.start()]
        if end < 0:
            if tag == "observation":
                raise BadRowError("an observation that is not closed; add </observation>")
            free, start = free + match[0], match.end()
            continue
        if free.strip():
            found.append(("", free.strip()))
        found.append((tag, text[match.end() : end]))
        free, start = "", end + len(tag) + 3
    free += text[start:]
    return [*found, ("", free.strip())] if free.strip() else found
