"""A client of OpenAI-compatible endpoints, for text that is never trained on: critics and judges."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import aiohttp

from icrl_megatron.utils import connections
from icrl_megatron.utils.connections import Connections, Link
from icrl_megatron.utils.retries import PassingError, tries

RETRIES = 3
_PASSING = (408, 409, 429, 500, 502, 503, 504)
"""Statuses after which a retry may help."""
_ANSWER_BYTES = 1 << 20
_BYTES_A_TOKEN = 256
"""The longest answer that is read: this many bytes, plus this many for each requested token."""


class EndpointError(RuntimeError):
    """The endpoint refused, still failed after the last retry, or sent something that is not an answer."""


@dataclass(frozen=True)
class EndpointClient:
    """Asks one model of one endpoint. `connections` limits the requests in flight."""

    url: str
    """Up to and without /chat/completions."""
    model: str
    api_key_env: str
    """Environment variable with the key."""
    timeout_s: float
    """Of one request."""
    connections: Connections
    first_pause_s: float = 1.0
    """Before the first retry; doubles with each further one."""

    async def ask(self, message: str, max_tokens: int, temperature: float, seed: int) -> str:
        """The answer to one user message, at most about 1 MiB of it. Raises EndpointError."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed % 2**31,
        }
        return await self._ask(self.connections.here(), json.dumps(body), _ANSWER_BYTES + _BYTES_A_TOKEN * max_tokens)

    async def _ask(self, link: Link, body: str, longest: int) -> str:
        async with link.gate:
            try:
                async for attempt in tries(RETRIES + 1, self.first_pause_s):
                    with attempt:
                        return await self._try(link, body, longest)
            except PassingError as error:
                raise EndpointError(f"at {self.url} failed: {error}") from error
        raise AssertionError("the last try returns or raises")

    async def _try(self, link: Link, body: str, longest: int) -> str:
        try:
            status, answer = await self._post(link.session, body, longest)
        except connections.TooLongError as error:
            raise EndpointError(f"at {self.url} failed: {error}") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise PassingError(f"{type(error).__name__}: {error}") from error
        if status == 200:
            return _content(answer)
        said = f"status {status}: {answer[:300]!r}"
        raise (PassingError(said) if status in _PASSING else EndpointError(f"at {self.url} failed: {said}"))

    async def _post(self, session: aiohttp.ClientSession, body: str, longest: int) -> tuple[int, bytes]:
        limit = aiohttp.ClientTimeout(total=self.timeout_s)
        url = f"{self.url.rstrip('/')}/chat/completions"
        async with session.post(url, data=body, headers=authorization(self.api_key_env), timeout=limit) as reply:
            return reply.status, await connections.body(reply, longest)


def authorization(api_key_env: str) -> dict[str, str]:
    key = os.environ.get(api_key_env, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _content(answer: bytes) -> str:
    """The text of an answer: a string, or a list of parts that are joined. Raises EndpointError for anything else."""
    try:
        text: Any = json.loads(answer)["choices"][0]["message"]["content"]
        if isinstance(text, list):
            text = "".join(_text(part["text"]) for part in text)
        return "" if text is None else _text(text)
    except (ValueError, RecursionError, LookupError, TypeError) as error:
        raise EndpointError(f"answered {answer[:200]!r}.") from error


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{type(text).__name__} is not text")
    return text
