"""Runs real smolagents agents with scripted models, and saves their memory as a user would: the file that
tests/cpu/test_step_logs.py reads. Needs smolagents, which is not among this package's dependencies.

    python -m venv /tmp/smolagents && /tmp/smolagents/bin/pip install smolagents==1.26.0
    /tmp/smolagents/bin/python tools/record_smolagents.py tests/recorded/smolagents_1_26.jsonl

A ToolCallingAgent plans, makes two calls in a step, names a tool that does not exist, and answers. A CodeAgent runs two
programs, one of them with an error, writes a reply without a program, and has no step left for its answer.
`get_succinct_steps` is `get_full_steps` without the messages that the model read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smolagents import CodeAgent, Model, ToolCallingAgent, tool
from smolagents.models import (
    ChatMessage,
    ChatMessageToolCall,
    ChatMessageToolCallFunction,
    MessageRole,
    TokenUsage,
)

Reply = tuple[str, list[tuple[str, dict[str, Any]]]]
"""Text, and calls: (tool, arguments)."""
CALLS: tuple[Reply, ...] = (
    ("1. Look up both.\n2. Add.\n<end_plan>", []),
    ("I look up both.", [("stock", {"item": "nails"}), ("stock", {"item": "saws"})]),
    ("", [("stocks", {"item": "saws"})]),
    ("", [("add", {"a": 870, "b": 12})]),
    ("The sum is known.", [("final_answer", {"answer": "882"})]),
)
PROGRAMS: tuple[Reply, ...] = (
    ("Thought: I look.\n<code>\nprint(stock('nails'))\n</code>", []),
    ("Thought: I open a file.\n<code>\nopen('stock')\n</code>", []),
    ("There are 870.", []),
    ("870", []),
)


@tool
def stock(item: str) -> str:
    """How many of an item are in stock.

    Args:
        item: The item.
    """
    return {"nails": "870", "saws": "12"}[item]


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


class Scripted(Model):
    """Says one reply after the other."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        super().__init__(model_id="scripted")
        self.replies = iter(replies)

    def generate(self, messages: Any, *arguments: Any, **more: Any) -> ChatMessage:
        text, calls = next(self.replies)
        made = [
            ChatMessageToolCall(ChatMessageToolCallFunction(given, name), id=f"call_{number}", type="function")
            for number, (name, given) in enumerate(calls)
        ]
        used = TokenUsage(input_tokens=10, output_tokens=5)
        return ChatMessage(MessageRole.ASSISTANT, text, made or None, token_usage=used)


def main(out: Path) -> None:
    calling = ToolCallingAgent([stock, add], Scripted(CALLS), planning_interval=9, verbosity_level=0)
    coding = CodeAgent([stock, add], Scripted(PROGRAMS), max_steps=3, verbosity_level=0)
    calling.run("How many nails and saws are there?")
    coding.run("How many nails are there?")
    steps = [step for agent in (calling, coding) for step in agent.memory.get_succinct_steps()]
    out.write_text("".join(json.dumps(step) + "\n" for step in steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
