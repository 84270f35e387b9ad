"""An MCP server for tests, of the official package: `python mcp_server.py MODE [PORT]`.

MODE: tools (also tools that misbehave), http (the same over streamable HTTP on PORT), pages (three, of one tool each),
endless (a list of tools without an end), empty, remote (a schema that refers to another host).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.stdio import stdio_server

tools = MCPServer("misbehaves")


@tools.tool()
def echo(text: str) -> str:
    return text


@tools.tool()
def process() -> str:
    return str(os.getpid())


@tools.tool()
def die() -> str:
    os._exit(3)


@tools.tool()
async def wait(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "done"


@tools.tool()
def hang() -> str:
    time.sleep(1000)
    return "never"


@tools.tool()
def flood(characters: int) -> str:
    return "x" * characters


@tools.tool()
def fail() -> str:
    raise RuntimeError("the tool is broken")


@tools.tool()
def picture() -> Image:
    return Image(data=b"GIF89a", format="gif")


async def listed(mode: str) -> None:
    async def page(context: object, asked: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        at = int(asked.cursor or 0) if asked else 0
        if mode == "empty":
            return types.ListToolsResult(tools=[])
        schema = {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:1/a.json"}}}
        tool = types.Tool(name=f"tool_{at}", input_schema=schema if mode == "remote" else {"type": "object"})
        more = mode == "endless" or (mode == "pages" and at < 2)
        return types.ListToolsResult(tools=[tool], next_cursor=str(at + 1) if more else None)

    server = Server("pages", on_list_tools=page)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tools"]:
            tools.run()
        case ["http", port]:
            tools.run("streamable-http", host="127.0.0.1", port=int(port), json_response=True)
        case [mode]:
            asyncio.run(listed(mode))
