"""Settings of the tools that task sets offer (`agent.tools`, docs/AGENTS.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from icrl_megatron.settings.limits import Range

TOOLS = ("search", "page", "python", "calculator", "mcp")


@dataclass
class PageTool:
    """Where `page` finds pages."""

    path: str = ""
    """JSONL file or folder of stored pages. Empty: the web, http and https, public addresses only."""
    chars: Annotated[int, Range(1)] = 8000
    """Longest answer, in characters. The rest is left out."""
    timeout_s: Annotated[float, Range(1e-3)] = 20.0
    """Time limit of a page of the web, in seconds, redirects included. Two tries must fit
    rollout.environment_timeout_s."""


@dataclass
class McpTools:
    """Tools of one MCP server. It has either a command or a URL."""

    command: list[str] = field(default_factory=list)
    """What starts the server, word by word, e.g. [mcp-server-time, --local-timezone, UTC]. Each rank starts its own."""
    url: str = ""
    """Address of a server that is already running, with streamable HTTP, e.g. http://host:8000/mcp."""
    tools: list[str] = field(default_factory=list)
    """Which of its tools the model gets, by the server's names. Empty: all."""
    prefix: str = ""
    """Is put before the names of its tools, for servers whose tools have the same names."""
    environment: list[str] = field(default_factory=list)
    """Names of environment variables that the command inherits, such as one with an API key. It always gets PATH, HOME
    and a few others."""
    version: str = ""
    """Names what answers depend on besides the arguments, so that tasks.tool_cache keeps them. Empty: never kept."""
    start_s: Annotated[float, Range(1e-3)] = 30.0
    """Time limit to start or reach the server and to list its tools, in seconds."""
    timeout_s: Annotated[float, Range(1e-3)] = 14.0
    """Time limit of one call, in seconds. Two tries and start_s must fit rollout.environment_timeout_s."""
