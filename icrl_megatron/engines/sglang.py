"""The client of an SGLang server: generation, weight updates, sleep, and failure handling.

Sends and receives token ids over SGLang's native API (sglang 0.5.23: entrypoints/http_server.py,
managers/io_struct.py). Log-probs are those of logits / T. SGLang ignores a request's seed unless it was started with
--enable-deterministic-inference, so a replayed request may give other tokens.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import torch

from icrl_megatron.engines import sglang_answers
from icrl_megatron.engines import sglang_weights as weights
from icrl_megatron.engines.flat_buffer import Shapes
from icrl_megatron.engines.protocol import (
    EngineError,
    EngineLostError,
    EngineStats,
    NeverSleeps,
    NoAnswerError,
    RequestFailedError,
    Sampling,
)
from icrl_megatron.engines.sglang_checks import Checksums
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings
from icrl_megatron.types import Completion, Ids, id_array, logprob_array
from icrl_megatron.utils import connections
from icrl_megatron.utils.connections import Connections, Link

RETRIES = 2
"""Times a request is resent after a connection error while the server is alive."""
GARBAGE_LIMIT = 3
"""Consecutive unusable answers after which the server is considered broken."""
ABORT_GRACE_S = 30.0
"""A server that does not answer an aborted request within this time is considered hung."""
_ABORT_AGAIN_S = 0.2
_DEATH_GRACE_S = 3.0
"""A dying server closes its connections a moment before its process ends."""
_CONTROL_TIMEOUT_S = 300.0
_FLUSH = "/flush_cache?timeout=60"
_PLAIN = {
    "top_p": 1.0, "top_k": -1, "min_p": 0.0,
    "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
}  # fmt: skip
"""Sent with every request: with other values the log-probs would not be those of the policy."""


class SGLangEngine:
    """Implements `engines.protocol.Engine` for the rank that leads a server; the other ranks have a `Follower`."""

    def __init__(
        self,
        server: Server,
        settings: EngineSettings,
        transport: Callable[[], weights.Transport],
        shapes: Shapes,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shapes` has every Hugging Face tensor of the model. The server must be ready (`wait_ready`) before the first
        request."""
        self.server, self.stats = server, EngineStats()
        self._settings, self._make_transport = settings, transport
        self._sender = weights.WeightSender(shapes, dtype, device, settings.bucket_mib, settings.keep_cache)
        self._transport: weights.Transport | None = None
        self._version = 0
        self._asleep = False
        self._half = ""
        """Why requests are refused until the next complete update."""
        self._vocabulary = shapes["model.embed_tokens.weight"][0]
        self._asked: set[asyncio.Future[bytes]] = set()
        """Requests that the server has not answered."""
        self._garbled = 0
        """Consecutive unusable answers."""
        self._lost = ""
        """Why no more requests are sent to the server until it is restarted."""
        self._connections = Connections(settings.max_batch)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """A request that exceeds `engine.request_timeout_s` is aborted: its completion has the tokens generated so far
        and the finish reason "abort".

        Raises RequestFailedError when the server refuses the request or answers garbage; EngineLostError when the
        server is dead, hangs, or answered garbage too often; EngineError while it sleeps or holds a partial update.
        """
        if (self._asleep or self._half) and not self._lost:
            raise EngineError(self._half or "The engine sleeps: call wake() before generate().")
        prompt = tuple(prompt_ids)
        link = self._connections.here()
        async with link.gate:
            for retry in range(RETRIES + 1):
                if link.interrupted.is_set():
                    return Completion(id_array(()), logprob_array(()), "abort", self._version)
                if self._lost:
                    raise EngineLostError(self._lost)
                self.stats.requests += retry == 0
                try:
                    answer = await self._ask(link, prompt, sampling)
                    break
                except (aiohttp.ClientError, OSError) as error:
                    await self._after_error(error, last=retry == RETRIES)
                    self.stats.retries += 1
        return self._taken(answer, sampling)

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Sends full tensors with Hugging Face names in buckets. A lost server gets none: it is restarted before it is
        used again.

        Raises EngineError, naming the first bad tensor, before anything malformed is sent, and if the server's answer
        is not as expected.
        """
        stream = iter(tensors)
        try:
            self._update(stream, version)
        except EngineError as error:
            if not self._died(error):
                raise
        for _ in stream:  # gathering is collective; a dead server gets its weights after a restart
            pass

    def _update(self, tensors: Iterable[Any], version: int, send: Callable[..., None] | None = None) -> None:
        if self._transport is None:
            self._transport = self._make_transport()
        self._half = f"The engine has only a part of the weights of version {version}: send a complete update."
        try:
            (send or self._sender.send_all)(tensors, version, self._transport, self.lost())
        except EngineError as error:
            if not self._died(error):
                with suppress(EngineError):  # report the first error; an update left open would block later ones
                    self._post("/end_weight_update", {})
            raise
        self._post("/end_weight_update", {})
        self._version, self._half = version, ""

    def verify(self, tensors: Iterable[tuple[str, torch.Tensor]], shape: ModelShape) -> bool:
        """Compares a checksum of every parameter. Returns False if the server is lost before or during the comparison.
        Raises EngineError with the first name whose values differ."""
        if self.lost():
            return False
        expected = Checksums(self._settings.tensor_parallel, shape)
        for name, tensor in tensors:
            expected.add(name, tensor)
        try:
            answer = self.server.post("/weights_checker", {"action": "checksum"}, self._settings.sync_timeout_s)
        except EngineError as error:
            if not self._died(error):
                raise
            return False
        expected.compare(answer)
        return True

    def sleep(self) -> None:
        """Releases the memory of weights and KV cache. A server on other GPUs keeps its memory: nothing else uses it,
        and if an external server's run were killed the next run could not know that the memory is released."""
        if not self._asleep:
            self._tell(_FLUSH, {})  # waits until the server is idle: SGLang crashes if it releases memory while busy
            self._tell_own("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
            self._asleep = True

    def wake_weights(self) -> None:
        """First stage of waking: allocates memory for weights, which are undefined until they are updated."""
        if self._asleep:
            self._tell_own("/resume_memory_occupation", {"tags": ["weights"]})

    def wake(self) -> None:
        """Second stage of waking: allocates memory for the KV cache."""
        if self._asleep:
            self._tell_own("/resume_memory_occupation", {"tags": ["kv_cache"]})
        self._asleep = False

    async def interrupt(self) -> None:
        """Aborts all requests in flight and waits for them: each returns what it has with finish reason "abort".
        Requests not yet sent in this event loop return nothing."""
        link = self._connections.here()
        if link.interrupted.is_set():  # another call is already waiting
            return
        link.interrupted.set()
        deadline = time.monotonic() + ABORT_GRACE_S
        # Repeat, because the server aborts only requests that have arrived.
        while self._asked and not self._lost and time.monotonic() < deadline:
            await self._abort(link, "", everything=True)
            if self._asked:
                await asyncio.wait(set(self._asked), timeout=_ABORT_AGAIN_S)

    async def pause(self) -> None:
        await self.interrupt()

    def resume(self) -> None:
        self._connections.here().interrupted.clear()

    def lost(self) -> str:
        """Why the server has to be restarted; empty while it is alive."""
        if self.server.spec is not None and not self.server.alive():
            self._lose(f"The SGLang server at {self.server.url} died.")
        return self._lost

    def start(self) -> None:
        if self.server.spec is not None:
            self.server.start()

    def wait_ready(self, tick: Callable[[], None] = lambda: None) -> None:
        """Raises EngineError with the end of the server's log if it does not become ready."""
        if self.server.spec is not None:
            self.server.wait_ready(tick)

    def revive(self) -> None:
        """Restarts the server with the weights of its folder. Raises EngineError."""
        if self.server.spec is None:
            raise EngineError(f"{self._lost} The run cannot restart it: restart it, then run this command again.")
        self.server.kill()
        if self._transport is not None:
            self._transport.close()
        self.server.start()
        self.server.wait_ready()
        self._transport, self._lost, self._half, self._asleep = None, "", "", False
        self._version = self._garbled = 0

    def take_stats(self) -> EngineStats:
        """Returns the counters since the last call."""
        taken, self.stats = self.stats, EngineStats()
        return taken

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self.server.kill()

    def _tell_own(self, path: str, body: dict[str, Any]) -> None:
        if self.server.spec is not None and not self.server.spec.on_engine_ranks:
            self._tell(path, body)

    def _tell(self, path: str, body: dict[str, Any]) -> None:
        """Posts to the server if it is alive; a lost server is restarted before it is used again."""
        if self.lost():
            return
        try:
            self._post(path, body)
        except EngineError as error:
            if not self._died(error):
                raise

    def _died(self, error: EngineError) -> bool:
        """Whether the server is lost after `error`. If the run's own server does not answer or answers something that
        SGLang never does, it is killed; the caller that restarts it counts the restarts."""
        if isinstance(error, NoAnswerError) and self.server.spec is not None:
            deadline = time.monotonic() + _DEATH_GRACE_S
            while not self.lost() and time.monotonic() < deadline:
                time.sleep(0.1)
            self._lost = self._lost or str(error)
            self.server.kill()
        return bool(self.lost())

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.server.post(path, body, _CONTROL_TIMEOUT_S)

    async def _ask(self, link: Link, prompt: Ids, sampling: Sampling) -> bytes:
        """One POST /generate, aborted at its deadline. Raises what `generate` handles or raises."""
        rid = uuid.uuid4().hex
        body = {
            "rid": rid,
            "input_ids": prompt,
            "sampling_params": {
                **_PLAIN,
                "temperature": sampling.temperature,
                "max_new_tokens": sampling.max_new_tokens,
                "stop_token_ids": list(sampling.stop_ids),
                "sampling_seed": sampling.seed,
                "stop": list(sampling.stop),
                "no_stop_trim": True,
            },
            "return_logprob": True,
        }
        asked = asyncio.ensure_future(self._fetch(link, body, sglang_answers.answer_bytes(sampling.max_new_tokens)))
        interrupted = asyncio.ensure_future(link.interrupted.wait())
        self._asked.add(asked)
        try:
            limit = self._settings.request_timeout_s
            await asyncio.wait({asked, interrupted}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                await self._cut_off(link, rid, asked)
            return asked.result()
        except asyncio.CancelledError:  # the episode was canceled
            await asyncio.shield(self._abort(link, rid))
            raise
        finally:
            self._asked.discard(asked)
            asked.cancel()
            interrupted.cancel()

    async def _cut_off(self, link: Link, rid: str, asked: asyncio.Future[bytes]) -> None:
        """Waits for the partial result of a request. Raises EngineLostError if it does not come."""
        late = not link.interrupted.is_set()  # otherwise `interrupt` aborts all requests
        self.stats.aborted += late
        aborting = asyncio.ensure_future(self._go_on_aborting(link, rid)) if late else None
        try:
            done, _ = await asyncio.wait({asked}, timeout=ABORT_GRACE_S)
        finally:
            if aborting is not None:
                aborting.cancel()
        if not done:
            self._lose(f"The SGLang server did not answer an abort within {ABORT_GRACE_S:g} s: it hangs.")
            raise EngineLostError(self._lost)

    async def _go_on_aborting(self, link: Link, rid: str) -> None:
        """Aborts repeatedly until canceled, because the server aborts only requests that have arrived."""
        while True:
            await self._abort(link, rid)
            await asyncio.sleep(_ABORT_AGAIN_S)

    async def _fetch(self, link: Link, body: dict[str, Any], longest: int) -> bytes:
        async with self._asked_for(link, "/generate", body) as reply:
            try:
                text = await connections.body(reply, longest)
            except connections.ResponseTooLongError as error:
                text = str(error).encode()  # counted as garbage
            if reply.status >= 500 or reply.status == 429:
                raise aiohttp.ClientPayloadError(f"status {reply.status}: {self.server.quoted(text)}")
            if reply.status != 200:
                raise RequestFailedError(f"SGLang refused a request: {reply.status} {self.server.quoted(text)}.")
            return text

    def _asked_for(self, link: Link, path: str, body: dict[str, Any], **options: Any) -> Any:
        url, headers = f"{self.server.url}{path}", self.server.headers()  # the key changes at each start
        return link.session.post(url, data=json.dumps(body), headers=headers, **options)

    async def _abort(self, link: Link, rid: str, everything: bool = False) -> None:
        try:
            limit = aiohttp.ClientTimeout(total=ABORT_GRACE_S)
            body = {"rid": rid, "abort_all": everything}
            async with self._asked_for(link, "/abort_request", body, timeout=limit) as reply:
                await connections.body(reply, sglang_answers.answer_bytes(0))
        except (aiohttp.ClientError, OSError, TimeoutError, RuntimeError, connections.ResponseTooLongError):
            pass  # a dead server, or a loop that ends (its session is closed): the next request will report it

    async def _after_error(self, error: Exception, last: bool) -> None:
        """Returns if a retry makes sense. Raises EngineLostError if the server is gone."""
        for _ in range(int(_DEATH_GRACE_S / 0.1)):
            if self._lost or not await asyncio.to_thread(self.server.alive):
                self._lose(f"The SGLang server at {self.server.url} died ({type(error).__name__}: {error}).")
                raise EngineLostError(self._lost) from error
            await asyncio.sleep(0.1)
        if last:
            raise RequestFailedError(f"SGLang failed a request {RETRIES + 1} times: {error}") from error

    def _taken(self, answer: bytes, sampling: Sampling) -> Completion:
        """Raises RequestFailedError for an unusable answer, and EngineLostError after GARBAGE_LIMIT in a row."""
        try:
            reply = sglang_answers.read(answer, sampling.max_new_tokens, self._vocabulary, self._version)
        except sglang_answers.GarbageError as error:
            self._garbled, why = self._garbled + 1, self.server.masked(str(error))
            if self._garbled < GARBAGE_LIMIT:
                raise RequestFailedError(why) from error
            self._lose(f"{self._garbled} answers in a row could not be used. {why}")
            raise EngineLostError(self._lost) from error
        if len(reply.completion.ids):
            self._garbled = 0
        self.stats.prompt_tokens += reply.prompt_tokens
        self.stats.cached_tokens += reply.cached_tokens
        return sglang_answers.ended(reply.completion, sampling.stop_ids)

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._lost = f"{why} {self.server.log_end()}"


class Follower(NeverSleeps):
    """The engine of a rank that shares a server without leading it: it sends its share of the weights and generates
    nothing. The leader puts the server to sleep."""

    def __init__(self, sink: weights.WeightSender, transport: weights.Transport | None) -> None:
        """`transport` is None if the leader's buffer is enough."""
        self._sender, self._transport = sink, transport

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        stream = iter(tensors)
        if self._transport is not None:
            with suppress(EngineError):  # the leader reports it once it knows whether the server is dead
                self._sender.send_all(stream, version, self._transport)
        for _ in stream:
            pass
