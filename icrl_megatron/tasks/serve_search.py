"""`icrl serve-search`: BM25 over a local corpus behind the API of Search-R1's retriever, which `searchqa` can search.

    POST /retrieve {"queries": ["..."], "topk": 3, "return_scores": true}
        {"result": [[{"document": {"contents": "..."}, "score": 7.1}, ...]]}, one list per query, best first
    GET /   200, for `serve.health`

Whoever connects is not trusted: body, queries, passages, time and requests at a time have limits, and the server only
reads the corpus.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from icrl_megatron.distributed import net
from icrl_megatron.tasks.retrieval import LocalRetriever
from icrl_megatron.utils.errors import ConfigError

BODY_BYTES = 1 << 20
QUERIES, PASSAGES = 64, 100
"""Of one request."""
QUERY_CHARS = 4096
"""Read of a query. A longer one is cut, not refused: the model wrote it, and a refusal would cost its episode."""
WAITING = 1024
"""Requests at a time; further ones are answered 503, which clients try again."""
READ_S, SEARCH_S, SHUTDOWN_S = 10.0, 60.0, 2.0


class BadRequest(ValueError):
    """The message says what a request may be."""


@dataclass(frozen=True)
class Asked:
    """A request of valid form."""

    queries: tuple[str, ...]
    passages: int
    scores: bool


def asked(body: bytes) -> Asked:
    """Raises BadRequest."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is not JSON") from error
    if not isinstance(found, dict):
        raise BadRequest("the body is not an object")
    queries, passages, scores = found.get("queries"), found.get("topk", 3), found.get("return_scores", False)
    if not isinstance(queries, list) or not 1 <= len(queries) <= QUERIES:
        raise BadRequest(f"queries must be a list of 1 to {QUERIES} texts")
    if not all(isinstance(query, str) for query in queries):
        raise BadRequest("each query must be a text")
    if type(passages) is not int or not 1 <= passages <= PASSAGES:
        raise BadRequest(f"topk must be 1 to {PASSAGES}")
    if not isinstance(scores, bool):
        raise BadRequest("return_scores must be true or false")
    return Asked(tuple(query[:QUERY_CHARS] for query in queries), passages, scores)


class SearchServer:
    """Handlers of one corpus. Searches run in as many threads as there are cores."""

    def __init__(self, retriever: LocalRetriever) -> None:
        self._retriever, self._waiting = retriever, 0
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="search")

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES)
        app.router.add_get("/", self.health)
        app.router.add_post("/retrieve", self.retrieve)
        return app

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"documents": len(self._retriever)})

    async def retrieve(self, request: web.Request) -> web.Response:
        if self._waiting >= WAITING:
            return _error(503, f"{WAITING} requests are being answered already")
        self._waiting += 1
        try:
            async with asyncio.timeout(READ_S):
                wanted = asked(await request.read())
            async with asyncio.timeout(SEARCH_S):
                loop = asyncio.get_running_loop()
                searches = (loop.run_in_executor(self._threads, self._found, q, wanted) for q in wanted.queries)
                return web.json_response({"result": await asyncio.gather(*searches)})
        except BadRequest as error:
            return _error(400, str(error))
        except TimeoutError:
            return _error(503, f"the request was not read within {READ_S:g} s or not answered within {SEARCH_S:g} s")
        finally:
            self._waiting -= 1

    def _found(self, query: str, wanted: Asked) -> list[dict[str, Any]]:
        found = self._retriever.scored(query, wanted.passages) if query.strip() else []
        documents = [{"contents": text} for text, _ in found]
        if not wanted.scores:
            return documents
        return [{"document": d, "score": s} for d, (_, s) in zip(documents, found, strict=True)]


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


def serve(corpus: Path, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT. Raises ConfigError for an invalid corpus, and for an address that cannot be
    listened on."""
    retriever = LocalRetriever(corpus)
    try:
        sock = net.bound(host, port)
        sock.listen()  # before its address is printed
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there ({error}); give another port") from error
    where = f"http://{host}:{sock.getsockname()[1]}"
    print(f"{len(retriever)} documents of {corpus} at {where}/retrieve", file=sys.stderr, flush=True)
    web.run_app(SearchServer(retriever).app(), sock=sock, print=None, access_log=None, shutdown_timeout=SHUTDOWN_S)
