"""A critic behind any OpenAI-compatible endpoint: the frozen-critic baseline, and the critic swap in evaluation."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass

import aiohttp

from icrl_megatron.engines.protocol import RequestFailedError
from icrl_megatron.rollout.prompts import CHARS_A_TOKEN, Prompter
from icrl_megatron.rollout.speakers import Ask
from icrl_megatron.settings.rollout_schema import ExternalCritic
from icrl_megatron.tasks.base import sendable
from icrl_megatron.types import Completion
from icrl_megatron.utils import connections
from icrl_megatron.utils.connections import Connections, Link
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.retries import PassingError, tries

RETRIES = 3
_FIRST_PAUSE_S = 0.5
_PASSING = (408, 409, 429, 500, 502, 503, 504)
"""Statuses after which a retry may help."""
_ANSWER_BYTES = 1 << 20
_BYTES_A_TOKEN = 256
"""The longest answer that is read: this many bytes, plus this many for each requested token."""
_MODELS_BYTES = 16 << 20
"""The longest list of models that is read."""


@dataclass(frozen=True)
class ExternalSpeaker:
    """A critic only. Its text is encoded once with the solver's tokenizer, with log-probs of 0, because the solver
    reads it and it is never trained on."""

    settings: ExternalCritic
    temperature: float
    prompter: Prompter
    connections: Connections

    async def reply(self, ask: Ask) -> Completion:
        """Returns no tokens, with finish reason "abort", if it is interrupted: an endpoint returns no partial answers.

        Raises RequestFailedError if the endpoint refuses, or still fails after RETRIES retries.
        """
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": ask.message}],
            "temperature": self.temperature,
            "max_tokens": ask.max_new_tokens,
            "seed": ask.seed % 2**31,
        }
        link = self.connections.here()
        longest = _ANSWER_BYTES + _BYTES_A_TOKEN * ask.max_new_tokens
        asked = asyncio.ensure_future(self._ask(link, json.dumps(body), longest))
        interrupted = asyncio.ensure_future(link.interrupted.wait())
        try:
            await asyncio.wait({asked, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                return Completion((), (), "abort", 0)
            text = sendable(asked.result())
        finally:
            asked.cancel()
            interrupted.cancel()
        # An endpoint that ignores max_tokens may send megabytes, which take seconds to encode.
        begin = text[: CHARS_A_TOKEN * ask.max_new_tokens]
        ids = self.prompter.encode_reply(begin)
        cut = ids[: ask.max_new_tokens]
        whole = len(begin) == len(text) and len(cut) == len(ids)
        return Completion(cut, (0.0,) * len(cut), "stop" if whole else "length", 0)

    async def interrupt(self) -> None:
        self.connections.here().interrupted.set()

    async def _ask(self, link: Link, body: str, longest: int) -> str:
        async with link.gate:
            try:
                async for attempt in tries(RETRIES + 1, 2 * _FIRST_PAUSE_S):
                    with attempt:
                        return await self._try(link, body, longest)
            except PassingError as error:
                raise RequestFailedError(f"The external critic at {self.settings.url} failed: {error}") from error
        raise AssertionError("the last try returns or raises")

    async def _try(self, link: Link, body: str, longest: int) -> str:
        try:
            status, answer = await self._post(link.session, body, longest)
        except connections.TooLongError as error:
            raise RequestFailedError(f"The external critic at {self.settings.url} failed: {error}") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PassingError(f"{type(error).__name__}: {error}") from error
        if status == 200:
            return _content(answer)
        said = f"status {status}: {answer[:300]!r}"
        if status in _PASSING:
            raise PassingError(said)
        raise RequestFailedError(f"The external critic at {self.settings.url} failed: {said}")

    async def _post(self, session: aiohttp.ClientSession, body: str, longest: int) -> tuple[int, bytes]:
        headers = _authorization(self.settings)
        limit = aiohttp.ClientTimeout(total=self.settings.timeout_s)
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        async with session.post(url, data=body, headers=headers, timeout=limit) as reply:
            return reply.status, await connections.body(reply, longest)


def first_model(settings: ExternalCritic) -> str:
    """The name of the first model that the endpoint serves. Raises ConfigError if there is none."""

    async def models() -> bytes:
        url, limit = f"{settings.url.rstrip('/')}/models", aiohttp.ClientTimeout(total=min(settings.timeout_s, 30.0))
        async with connections.open_session() as session:
            async with session.get(url, headers=_authorization(settings), timeout=limit) as reply:
                return await connections.body(reply, _MODELS_BYTES)

    try:
        return str(json.loads(asyncio.run(models()))["data"][0]["id"])
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--critic={settings.url}: no OpenAI-compatible endpoint there ({type(error).__name__}: {error}); give the "
            f"base URL without /chat/completions, e.g. http://host:30000/v1, and put the key, if it needs one, in "
            f"{settings.api_key_env}"
        ) from error


def _authorization(settings: ExternalCritic) -> dict[str, str]:
    key = os.environ.get(settings.api_key_env, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _content(answer: bytes) -> str:
    """The text of an answer: a string, or a list of parts that are joined. Raises RequestFailedError for anything
    else."""
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
        if isinstance(text, list):
            text = "".join(_text(part["text"]) for part in text)
        return "" if text is None else _text(text)
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise RequestFailedError(f"The external critic answered {answer[:200]!r}.") from error


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{type(text).__name__} is not text")
    return text
