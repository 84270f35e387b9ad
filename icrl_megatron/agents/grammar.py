"""Which agent of a sequence may follow which (Chain-of-Agents, arXiv 2508.13167). Agents are tags of the replies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from icrl_megatron.utils.errors import ConfigError

ANSWER = "answer"


@dataclass(frozen=True)
class Grammar:
    """The order of agents in an attempt. Answers of tools, which the runtime writes, do not count.

    Example: Grammar(("plan", "search"), first=("plan",), after={"plan": ("search",)})
    """

    agents: tuple[str, ...]
    """All agents, except `answer`, which ends every attempt."""
    first: tuple[str, ...]
    """Those that an attempt may begin with."""
    after: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Agent -> those that may follow it; an agent that is not listed may be followed by any."""

    def score(self, replies: Sequence[str]) -> float:
        """1 if the replies of an attempt follow the grammar, else 0: every tag is closed before another one opens, the
        first agent and each transition are allowed, and the attempt ends with its only answer."""
        spoken = [agent for reply in replies for agent in self._agents_of(reply)]
        if not spoken or spoken[0] not in self.first or spoken[-1] != ANSWER:
            return 0.0
        return float(all(self._allowed(agent, following) for agent, following in pairwise(spoken)))

    def _allowed(self, agent: str, following: str) -> bool:
        return agent != ANSWER and following in self.after.get(agent, (*self.agents, ANSWER))

    def _agents_of(self, reply: str) -> list[str]:
        """The agents of a reply in order; [""] if a tag is not closed or opens inside another one."""
        tags = re.findall(rf"<(/?)({'|'.join(map(re.escape, (*self.agents, ANSWER)))})>", reply)
        opening, closing = tags[::2], tags[1::2]
        balanced = len(tags) % 2 == 0 and all(
            not left and right and name == same for (left, name), (right, same) in zip(opening, closing, strict=True)
        )
        return [name for _, name in opening] if balanced else [""]


GRAMMARS = {
    "multi_hop": Grammar(("think", "plan", "reflection", "search"), first=("think", "plan")),
    "web": Grammar(
        ("think", "plan", "reflection", "suggested_answer", "double_check", "search", "page"),
        first=("think",),
        after={"suggested_answer": ("double_check",), "double_check": (ANSWER, "plan")},
    ),
    "code": Grammar(
        ("think", "reflection", "python"),
        first=("think",),
        after={"python": ("reflection",), "reflection": ("think", ANSWER)},
    ),
}
"""The paper's settings, with the names of our tools. Facts from the published prompts (AFM/data) and the format checker
for code."""


def named_grammar(name: str) -> Grammar | None:
    """None for an empty name. Raises ConfigError for an unknown one."""
    if name and name not in GRAMMARS:
        raise ConfigError(f"data.grammar={name}: must be one of {', '.join(GRAMMARS)}, or empty")
    return GRAMMARS.get(name)
