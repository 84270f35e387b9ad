"""Requests that are aborted while they run, are being sent or wait, and the limit on concurrent requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import torch
from aiohttp import web
from local_servers import serving

from icrl_megatron.engines import sglang
from icrl_megatron.engines.protocol import EngineLostError, Sampling
from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.engines.sglang_weights import Transport
from icrl_megatron.settings.schema import EngineSettings
from icrl_megatron.types import Completion

SAMPLING = Sampling(1.0, 4, 0, ())
WHOLE_S = 8.0
"""Seconds of a request that is not aborted."""


@dataclass
class Slow:
    """Generates for WHOLE_S or until an abort. It can abort a request only `known_after_s` after it arrived."""

    known_after_s: float = 0.0
    ignores_aborts: bool = False
    running: dict[str, asyncio.Event] = field(default_factory=dict)
    begun: int = 0
    most: int = 0
    """Largest number of concurrent requests."""
    _here: int = 0

    async def generate(self, request: web.Request) -> web.Response:
        rid, aborted = (await request.json())["rid"], asyncio.Event()
        self.begun, self._here = self.begun + 1, self._here + 1
        self.most = max(self.most, self._here)
        await asyncio.sleep(self.known_after_s)
        self.running[rid] = aborted
        try:
            async with asyncio.timeout(WHOLE_S):
                await aborted.wait()
        except TimeoutError:
            pass
        del self.running[rid]
        self._here -= 1
        kind = "abort" if aborted.is_set() else "length"
        meta = {"finish_reason": {"type": kind}, "prompt_tokens": 2, "weight_version": "default"}
        return web.json_response({"meta_info": {**meta, "output_token_logprobs": [[-1.0, 5, None]]}})

    async def abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        for rid, event in self.running.items():
            if not self.ignores_aborts and (body["abort_all"] or rid == body["rid"]):
                event.set()
        return web.Response()


def no_transport() -> Transport:
    raise AssertionError("no weights are sent here")


@asynccontextmanager
async def on(slow: Slow, **changes: object) -> AsyncIterator[SGLangEngine]:
    """An engine of the server. It must be used for less than half of WHOLE_S."""
    settings = EngineSettings(**{"kind": "sglang", "max_batch": 2, **changes})  # type: ignore[arg-type]
    shapes = {"model.embed_tokens.weight": (16, 2)}
    routes = web.post("/generate", slow.generate), web.post("/abort_request", slow.abort)
    async with serving(*routes) as url:
        begun = time.monotonic()
        yield SGLangEngine(Server(None, url), settings, no_transport, shapes, torch.float32, torch.device("cpu"))
        assert time.monotonic() - begun < WHOLE_S / 2


def ask(engine: SGLangEngine, count: int) -> list[asyncio.Future[Completion]]:
    return [asyncio.ensure_future(engine.generate((1, 2), SAMPLING)) for _ in range(count)]


async def test_at_most_max_batch_requests_are_in_flight() -> None:
    slow = Slow()
    async with on(slow, max_batch=3, request_timeout_s=0.1) as engine:
        assert [c.finish_reason for c in await asyncio.gather(*ask(engine, 7))] == ["abort"] * 7
    assert (slow.begun, slow.most) == (7, 3)


@pytest.mark.parametrize("known_after_s", [0.0, 0.6])
async def test_interruption_ends_running_and_waiting_requests(known_after_s: float) -> None:
    slow = Slow(known_after_s)
    async with on(slow) as engine:
        asked = ask(engine, 6)
        await asyncio.sleep(0.3)
        await engine.interrupt()
        assert slow.running == {}
        found = await asyncio.gather(*asked, engine.generate((1, 2), SAMPLING))
        assert (engine.stats.requests, engine.stats.aborted) == (2, 0)
    assert [c.ids.tolist() for c in found] == [[5], [5], [], [], [], [], []]
    assert {c.finish_reason for c in found} == {"abort"}
    assert slow.begun == 2


async def test_abort_is_repeated_until_the_server_knows_the_request() -> None:
    async with on(Slow(known_after_s=0.6), request_timeout_s=0.1) as engine:
        assert (await engine.generate((1, 2), SAMPLING)).finish_reason == "abort"


async def test_server_that_ignores_an_interruption_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "ABORT_GRACE_S", 0.5)
    async with on(Slow(ignores_aborts=True)) as engine:
        asked = ask(engine, 2)
        await asyncio.sleep(0.2)
        await engine.interrupt()
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(d) for d in done] == [EngineLostError] * 2
        assert "hangs" in engine.lost()
