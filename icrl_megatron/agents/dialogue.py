"""How the turns of a task become tokens: where a reply stops, and how the model sees an observation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dialogue:
    """The default: replies end with the chat template's end of turn, and observations are user messages.

    Example: Dialogue(stop=("</search>", "</answer>"), observation="inline", before="<observation>",
    after="</observation>")
    """

    tools: str = ""
    """JSON list of the tools that the chat template shows to the model (OpenAI's function format); empty: none."""
    stop: tuple[str, ...] = ()
    """A reply ends with the token that completes one of these. The whole token stays in the reply."""
    observation: Literal["user", "tool", "inline"] = "user"
    """user: a user message. tool: the template's tool messages, one per call. inline: text that the same reply
    continues after; only a reply that ended its turn gets a user message."""
    before: str = ""
    """Inline only: text before an observation, written by the format."""
    after: str = ""
    """Inline only: text after it."""
