"""HTTP servers on loopback for tests."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiohttp import web


@asynccontextmanager
async def serving(*routes: web.RouteDef, **options: float) -> AsyncIterator[str]:
    """The address of a server in this event loop."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, **{"shutdown_timeout": 0.1, **options})
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def said(text: object) -> web.Response:
    """A reply as an OpenAI-compatible endpoint sends it."""
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}]})


class Replies:
    """Answers requests with these replies in turn, and with the last one from then on. A reply is a function that makes
    the response, a dict to send as JSON, or a text as an OpenAI-compatible endpoint sends it."""

    def __init__(self, *replies: Callable[[], web.StreamResponse] | dict[str, object] | str | None) -> None:
        self.replies = replies
        self.seen: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(await request.json())
        reply = self.replies[min(len(self.seen), len(self.replies)) - 1]
        if callable(reply):
            return reply()
        return web.json_response(reply) if isinstance(reply, dict) else said(reply)


class Handler(BaseHTTPRequestHandler):
    """Writes no log."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_json(self, answer: object, status: int = 200) -> None:
        self.send(json.dumps(answer).encode(), status)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def threaded(handler: type[Handler], **fields: Any) -> Iterator[str]:
    """The address of a server with threads of its own. Its handlers have `fields`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (handler,), fields))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
