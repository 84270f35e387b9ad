"""A trajectory: what a multi-agent system, or one model that plays as one, wrote and observed in a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from icrl_megatron.agents.tools import ToolCall, ToolSpec

SegmentKind = Literal["text", "call", "observation", "answer"]
ASSISTANT, THINK, USER = "assistant", "think", "user"
"""Agents with a meaning of their own: free text, the model's thinking, and later messages of the user."""


@dataclass(frozen=True)
class Segment:
    """What one agent contributed.

    Examples: Segment("plan", "First find the home of p 4 8 3.", "text"),
    Segment("search", "", "call", call=ToolCall("search", {"query": "p 4 8 3"})),
    Segment("search", "p 4 8 3 lives in t 0 2 7", "observation", trained=False), Segment("answer", "4 2", "answer")
    """

    agent: str
    """The role that wrote it (`plan`, `reflection`, `answer`; `assistant` if it has none), or the tool. An
    observation of `user` is a later message of the user."""
    text: str
    """Empty for a call, which `call` holds."""
    kind: SegmentKind = "text"
    trained: bool = True
    """Whether its tokens carry loss."""
    call: ToolCall | None = None

    def __post_init__(self) -> None:
        if (self.kind == "call") != (self.call is not None):
            raise ValueError(f"a segment of kind {self.kind!r} with call={self.call}: calls, and only calls, have one")
        if self.kind == "observation" and self.trained:
            raise ValueError("an observation is never trained on: the model did not write it")


@dataclass(frozen=True)
class Tokens:
    """What a trajectory cost the system that produced it, in tokens of the system's own tokenizer."""

    read: int = 0
    """Prompt tokens, summed over all requests: a message that is sent again counts again."""
    written: int = 0


@dataclass(frozen=True)
class Trajectory:
    """One solved or failed task. Observations follow their calls: n calls in a row are followed by n observations in
    the same order.

    Example: Trajectory("archive/train/7", "size home p 4 8 3 ?", (Segment(...), ...), correct=True)
    """

    task_id: str
    problem: str
    """The user's message."""
    segments: tuple[Segment, ...]
    correct: bool | None = None
    """None: it was not judged."""
    spent: Tokens = Tokens()
    system: str = ""
    """The system message; empty: none."""
    tools: tuple[ToolSpec, ...] = ()
    """The tools that could be called."""
