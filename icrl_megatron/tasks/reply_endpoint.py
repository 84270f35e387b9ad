"""An OpenAI-compatible endpoint on loopback whose replies our side writes, for packages whose agents request them.

Imported by processes that have only the package (`line_worker.py`) and aiohttp.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

from aiohttp import web

from icrl_megatron.tasks.stepped_rollout import WaitingModel

Json = dict[str, Any]
NO_TURNS = "context_length_exceeded: the attempt has no more turns"
LARGEST = 2**28
"""Bytes of a request: a whole conversation."""


class ReplyEndpoint:
    """For each rollout, by the id that its requests have as X-Session-ID, the model that replies."""

    def __init__(self, key_variable: str) -> None:
        """`key_variable`: the environment variable in which the agents find the key."""
        self.models: dict[str, WaitingModel] = {}
        self._key = os.environ[key_variable] = secrets.token_hex(16)

    async def start(self) -> str:
        """Its address."""
        app = web.Application(client_max_size=LARGEST)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    async def _complete(self, request: web.Request) -> web.Response:
        model = self.models.get(request.headers.get("X-Session-ID", ""))
        if model is None or request.headers.get("Authorization") != f"Bearer {self._key}":
            return web.json_response({"error": {"message": "no such rollout"}}, status=401)
        body = await request.json()
        reply = await model.reply(
            list(map(flat, body["messages"])), [tool["function"] for tool in body.get("tools", ())]
        )
        if reply is None:
            return web.json_response({"error": {"message": NO_TURNS}}, status=400)
        message = {"role": "assistant", "content": reply["content"]}
        if calls := reply.get("tool_calls"):
            message["tool_calls"] = [
                {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
                for c in calls
            ]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
        made = {"id": secrets.token_hex(8), "object": "chat.completion", "created": 0, "model": "policy"}
        return web.json_response({**made, "choices": [choice]})


def flat(message: Json) -> Json:
    """A message as `WaitingModel` takes it, of one in OpenAI's form."""
    calls = [{"id": call["id"], **call["function"]} for call in message.get("tool_calls") or ()]
    return {"role": message["role"], "content": message.get("content"), "tool_calls": calls}
