"""Which agent may follow which in a sequence of tagged text, and whether an episode kept to it.

The grammars are those of Chain-of-Agents (arXiv 2508.13167), with any tool in place of the paper's own tools.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

START, TOOL, ANSWER = "start", "tool", "answer"
_TOOL_TAG = "tool_call"
"""The tag of formats that name the tool inside of the call."""
_OBSERVED = ("observation", "information")
"""Only the runtime writes these tags of inline observations: a reply with one has invented an observation."""


@dataclass(frozen=True)
class Grammar:
    """`after[tag]` lists the tags that may follow `tag`; `after[START]` lists the first ones. TOOL stands for any call.
    A call ends its reply, so what follows it is in the next reply. Every sequence ends with an answer.
    """

    after: Mapping[str, frozenset[str]]
    roles: tuple[str, ...] = ("think", "plan", "reflection", "suggested_answer", "double_check")
    """Tags of role-playing agents that are read. One that `after` does not have is never allowed."""


def _grammar(**after: str) -> Grammar:
    return Grammar({**{tag: frozenset(following.split()) for tag, following in after.items()}, ANSWER: frozenset()})


GRAMMARS: dict[str, Grammar] = {
    "calls": replace(_grammar(start="tool answer", tool="tool answer"), roles=()),
    "multi_hop": _grammar(
        start="think plan",
        think="think plan reflection tool answer",
        plan="think reflection tool",
        reflection="think plan tool answer",
        tool="think plan reflection tool answer",
    ),
    "web": _grammar(
        start="think",
        think="plan reflection tool suggested_answer",
        plan="think tool",
        reflection="think plan tool suggested_answer",
        tool="think plan reflection tool suggested_answer",
        suggested_answer="double_check",
        double_check="think plan answer",
    ),
    "code": _grammar(start="think", think="tool answer", tool="reflection", reflection="think"),
}
"""`calls` reads only calls and answers: text outside of them, role tags included, is free. The choice of
`double_check` between answer and a new plan depends on its score, which is not read."""


def format_score(replies: Sequence[str], grammar: Grammar, tools: Collection[str]) -> float:
    """1.0 if the replies of one attempt, in order, keep to the grammar; else 0.0. Linear in their length.

    Observations are no part of `replies`. Kept means: every tag that the grammar reads is closed in its own reply and
    holds no other one, the first tag and each next one are allowed, a call is the last tag of its reply, and the last
    tag of all is an answer. There is no partial score: the format multiplies the answer's reward, and a share of
    allowed transitions would grow with padding (many thoughts hide one missing check).
    """
    calls = {*tools, _TOOL_TAG}
    names = {*grammar.roles, ANSWER, *calls, *_OBSERVED}
    tags = re.compile(f"<(/?)({'|'.join(map(re.escape, names))})>")
    last = START
    for reply in replies:
        opened, called = "", False
        for closing, name in tags.findall(reply):
            if closing:
                if name != opened:
                    return 0.0
                opened = ""
                continue
            kind = TOOL if name in calls else name
            if opened or called or kind not in grammar.after[last]:
                return 0.0
            opened, last, called = name, kind, kind == TOOL
        if opened:
            return 0.0
    return float(last == ANSWER)


def without_tags(text: str, tools: Collection[str]) -> str:
    """The text without any tag of any grammar, for judges."""
    names = {*Grammar.roles, ANSWER, *tools, _TOOL_TAG, *_OBSERVED}
    return re.sub(f"</?(?:{'|'.join(map(re.escape, names))})>", "", text)
