"""A client of OpenAI-compatible endpoints, for text that no policy sampled: critics, judges, agents of a system."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from icrl_megatron.utils import addresses, connections
from icrl_megatron.utils.connections import Connections, Link
from icrl_megatron.utils.retries import PassingError, tries

RETRIES = 3
_PASSING = (408, 409, 429, 500, 502, 503, 504)
"""Statuses after which a retry may help."""
_ANSWER_BYTES = 1 << 20
_BYTES_A_TOKEN = 256
"""The longest answer that is read: this many bytes, plus this many for each requested token."""
_SHOWN_CHARS = 300
"""Characters of an invalid answer that an error message shows."""
_LONGEST_PAUSE_S = 60.0
"""The longest Retry-After that is obeyed."""


class EndpointError(RuntimeError):
    """The endpoint refused, still failed after the last retry, or sent something that is not an answer."""


@dataclass(frozen=True)
class ChatMessage:
    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True)
class ChatAnswer:
    text: str
    read: int | None
    """Prompt tokens, as the endpoint counted them; None if it does not say."""
    written: int | None
    """Completion tokens, likewise."""


@dataclass
class Pace:
    """Spaces the requests to one endpoint, retries included, and holds all of them back while it asks for a pause
    (Retry-After)."""

    per_minute: float = math.inf
    _next: float = field(default=0.0, init=False)

    async def wait(self) -> None:
        """Returns when the next request may start."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + 60.0 / self.per_minute
        if start > now:
            await asyncio.sleep(start - now)

    def hold(self, seconds: float) -> None:
        """No request starts in the next `seconds`, at most a minute."""
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now + min(max(seconds, 0.0), _LONGEST_PAUSE_S))


@dataclass(frozen=True)
class EndpointClient:
    """Asks one model of one endpoint. `connections` limits the requests in flight."""

    url: str
    """Up to and without /chat/completions."""
    model: str
    api_key_env: str
    """Environment variable with the key."""
    timeout_s: float
    """Time limit of one request."""
    connections: Connections
    first_pause_s: float = 1.0
    """Before the first retry; doubles with each further one."""
    pace: Pace = field(default_factory=Pace)
    constant: bool = True
    """Its model stays the same, so that answers may be kept."""

    async def ask(self, message: str, max_tokens: int, temperature: float, seed: int) -> str:
        """The answer to one user message, at most about 1 MiB of it. Raises EndpointError."""
        return (await self.chat([ChatMessage("user", message)], max_tokens, temperature, seed)).text

    async def chat(self, messages: Sequence[ChatMessage], max_tokens: int, temperature: float, seed: int) -> ChatAnswer:
        """The answer to a chat. Raises EndpointError."""
        body = {
            "model": self.model,
            "messages": [vars(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed % 2**31,
        }
        return await self._ask(self.connections.here(), json.dumps(body), _ANSWER_BYTES + _BYTES_A_TOKEN * max_tokens)

    async def _ask(self, link: Link, body: str, longest: int) -> ChatAnswer:
        async with link.gate:
            try:
                async for attempt in tries(RETRIES + 1, self.first_pause_s):
                    with attempt:
                        return await self._try(link, body, longest)
            except PassingError as error:
                raise self._failed(error) from error
        raise AssertionError("the last try returns or raises")

    async def _try(self, link: Link, body: str, longest: int) -> ChatAnswer:
        await self.pace.wait()
        try:
            status, answer = await self._post(link.session, body, longest)
        except connections.ResponseTooLongError as error:
            raise self._failed(error) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PassingError(f"{type(error).__name__}: {error}") from error
        if status == 200:
            try:
                return _answer(answer)
            except (ValueError, RecursionError, LookupError, TypeError) as error:
                wanted = "which is no chat completion of OpenAI's form: correct the address or the server"
                raise self._failed(f"it answered {self._shown(answer)!r}, {wanted}") from error
        said = f"status {status}: {self._shown(answer)!r}"
        raise PassingError(said) if status in _PASSING else self._failed(said)

    def _failed(self, why: object) -> EndpointError:
        return EndpointError(f"at {addresses.shown(self.url)} failed: {addresses.hidden(str(why), self._key())}")

    def _shown(self, answer: bytes) -> str:
        """The beginning of an answer. It may repeat the key, which must not be cut before it is hidden."""
        return addresses.hidden(answer.decode(errors="replace"), self._key())[:_SHOWN_CHARS]

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "")

    async def _post(self, session: aiohttp.ClientSession, body: str, longest: int) -> tuple[int, bytes]:
        limit = aiohttp.ClientTimeout(total=self.timeout_s)
        url = f"{self.url.rstrip('/')}/chat/completions"
        async with session.post(url, data=body, headers=authorization(self.api_key_env), timeout=limit) as reply:
            if reply.status in (429, 503):
                self.pace.hold(_seconds(reply.headers.get("Retry-After", "")))
            return reply.status, await connections.body(reply, longest)


def authorization(api_key_env: str) -> dict[str, str]:
    key = os.environ.get(api_key_env, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _seconds(retry_after: str) -> float:
    """A Retry-After header in seconds; 0 for none, and for a date."""
    return float(retry_after) if retry_after.isascii() and retry_after.isdecimal() and len(retry_after) < 10 else 0.0


def _answer(answer: bytes) -> ChatAnswer:
    """The text of an answer is a string, or a list of parts that are joined. Raises ValueError, RecursionError,
    LookupError or TypeError for anything else."""
    found: Any = json.loads(answer)
    text: Any = found["choices"][0]["message"]["content"]
    if isinstance(text, list):
        text = "".join(_text(part["text"]) for part in text)
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    return ChatAnswer("" if text is None else _text(text), *counts)


def _count(number: object) -> int | None:
    return number if type(number) is int and 0 <= number < 2**40 else None


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{type(text).__name__} is not text")
    return text
