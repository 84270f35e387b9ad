"""Replies that are cut off and continue later: under the weights of that time, with another seed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from icrl_megatron.engines.protocol import Engine, Pausable, Sampling
from icrl_megatron.types import Completion, IdArray, joined

if TYPE_CHECKING:
    import torch

BeforeStop = Callable[[IdArray, Sequence[str]], IdArray]
"""(ids of a reply that was cut off, its stop strings) -> its beginning without a stop string that has begun: an engine
looks for stop strings in new tokens only."""


def continued(begun: Completion, rest: Completion) -> Completion:
    """A reply that was cut off and its rest as one completion. Each token keeps its log-prob and its version."""
    ended = len(begun.ids) - sum(tokens for _, tokens in begun.older)
    older = (*begun.older, (begun.weight_version, ended)) if ended else begun.older
    older += rest.older
    ids, logprobs = joined([begun.ids, rest.ids], np.int32), joined([begun.logprobs, rest.logprobs], np.float32)
    return Completion(ids, logprobs, rest.finish_reason, rest.weight_version, older)


def rest_seed(seed: int, tokens: int) -> int:
    """The seed of a request that continues after `tokens` tokens. With the seed of the beginning, the engine would
    draw the same random numbers again, and the tokens would not be independent."""
    key = repr((seed, tokens)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


class PausableEngine(Engine, Pausable, Protocol):
    """An engine whose requests can be ended and continued."""


class ContinuingEngine:
    """Answers requests on an engine whose weights may change before a request has finished. A pause cuts running
    requests off; after `resume` they continue with the tokens that they have, and new ones begin."""

    def __init__(self, engine: PausableEngine, before_stop: BeforeStop) -> None:
        self._engine, self._before_stop = engine, before_stop
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Raises what the engine raises. A finish reason "abort" is the engine's own, for example at a deadline."""
        begun: Completion | None = None
        prompt = tuple(prompt_ids)
        while True:
            while not self._open.is_set():  # it may be paused again before a request that waited runs
                await self._open.wait()
            reply = await self._counted((*prompt, *(begun.ids.tolist() if begun else ())), sampling, begun)
            begun = reply if begun is None else continued(begun, reply)
            if reply.finish_reason != "abort" or self._open.is_set():
                return begun
            if len(begun.ids) >= sampling.max_new_tokens:
                return replace(begun, finish_reason="length")
            begun = begun.first(len(self._before_stop(begun.ids, sampling.stop)))

    async def _counted(self, prompt: Sequence[int], sampling: Sampling, begun: Completion | None) -> Completion:
        if begun is not None and (tokens := len(begun.ids)):
            seed, left = rest_seed(sampling.seed, tokens), sampling.max_new_tokens - tokens
            sampling = replace(sampling, seed=seed, max_new_tokens=left)
        self._running += 1
        self._idle.clear()
        try:
            return await self._engine.generate(prompt, sampling)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._engine.update_weights(tensors, version)

    def sleep(self) -> None:
        self._engine.sleep()

    def wake_weights(self) -> None:
        self._engine.wake_weights()

    def wake(self) -> None:
        self._engine.wake()

    def close(self) -> None:
        self._engine.close()

    async def interrupt(self) -> None:
        """Does nothing: no episode is cut off for others (`rollout.oversample`)."""

    async def pause(self) -> None:
        """Returns when no request is running. Those that were cut off continue after `resume`."""
        self._open.clear()
        await self._engine.pause()
        await self._idle.wait()

    async def before_others(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Answers a request during a pause, once the engine has its weights: those that wait for `resume` run later.
        The next pause ends it, and it does not continue. Raises what the engine raises."""
        self._engine.resume()
        return await self._counted(prompt_ids, sampling, None)

    def hold(self) -> None:
        """Requests wait until `resume`, or until a pause has ended: the engine does not have the current weights."""
        self._open.clear()

    def resume(self) -> None:
        self._engine.resume()
        self._open.set()
