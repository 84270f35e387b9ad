"""What a tool is: its specification, a call, a result, and the two ways in which a call fails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Arguments = Mapping[str, Any]
Outcome = Literal["answer", "repeat", "stopped", "invalid", "refused"]
_SORTED = json.JSONEncoder(sort_keys=True)


@dataclass(frozen=True)
class ToolSpec:
    """What the model is told about a tool.

    Example: ToolSpec("double", "Doubles n.", {"type": "object", "properties": {"n": {"type": "integer"}}})
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object."""
    version: str = ""
    """Names what answers depend on besides the arguments, such as the collection that is searched: equal versions and
    arguments have equal answers, so `tasks.tool_cache` may keep them. Empty: never kept, as for tools with state."""
    by_server: bool = field(default=False, compare=False)
    """Whether the schema comes from a server, so that it is not trusted, and the server checks arguments again."""

    @staticmethod
    def of_text(name: str, description: str, argument: str, **limits: int) -> ToolSpec:
        """A tool with one text argument; `limits` are keywords of its JSON schema, such as maxLength=400."""
        text = {"type": "string", **limits}
        schema = {"type": "object", "properties": {argument: text}, "required": [argument]}
        return ToolSpec(name, description, {**schema, "additionalProperties": False})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that was read from a reply.

    Example: ToolCall("search", {"query": "capital of France"})
    """

    name: str
    arguments: Arguments

    def key(self) -> str:
        """Equal for calls of one tool with equal arguments, whatever their order."""
        return f"{self.name} {self.written_arguments()}"

    def written_arguments(self) -> str:
        """JSON of the arguments in ASCII, the same for equal arguments in any order."""
        return _SORTED.encode(self.arguments)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the model observes after a call."""

    text: str
    outcome: Outcome
    """answer | repeat (from the episode's history) | stopped (asked too often) | invalid (the model's mistake) |
    refused (after `rollout.max_calls`)."""


class Tool(Protocol):
    """One tool, shared by all episodes of a process: it keeps no state of an episode."""

    spec: ToolSpec

    async def call(self, arguments: Arguments) -> str:
        """The answer to arguments that satisfy `spec.parameters`.

        Raises ToolUseError when the model asked for something that cannot be answered, and ToolFailure when the
        infrastructure failed.
        """
        ...


@runtime_checkable
class Stateful(Tool, Protocol):
    """A tool whose answers depend on the episode's earlier calls."""

    def open(self) -> Tool:
        """The tool of one episode; the tool itself if it keeps no state. It holds nothing that must be closed."""
        ...


class ToolUseError(ValueError):
    """The model's mistake. It observes the message."""


class ToolFailure(RuntimeError):
    """A failure of the infrastructure. The model never observes it, and it never becomes a reward."""
