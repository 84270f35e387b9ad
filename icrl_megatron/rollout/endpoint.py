"""A critic behind any OpenAI-compatible endpoint: text in, text out. For evaluation only: there are no log-probs."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

import httpx2

from icrl_megatron.config import ConfigError
from icrl_megatron.rollout.engine import EngineError
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import Ask
from icrl_megatron.types import Completion

KEY_ENV = "ICRL_CRITIC_KEY"
"""Environment variable with the endpoint's key, where it wants one."""
TRIES = 4


@dataclass(frozen=True)
class EndpointSpeaker:
    """Asks `url`/chat/completions. Its text is encoded by the solver's tokenizer, so that the critiques of all
    critics are counted in the same tokens."""

    client: httpx2.AsyncClient
    url: str
    model: str
    prompter: Prompter
    temperature: float

    async def reply(self, ask: Ask) -> Completion:
        """Raises EngineError when the endpoint does not answer, after `TRIES` tries, or answers something else."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompter.content(ask.prompt_ids)}],
            "max_tokens": ask.max_new_tokens,
            "temperature": self.temperature,
            "seed": ask.seed % 2**31,
        }
        failure = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(0.5 * 2**attempt)
            try:
                response = await self.client.post(f"{self.url}/chat/completions", json=body)
                if response.status_code == 200:
                    text = response.json()["choices"][0]["message"]["content"] or ""
                    ids = self.prompter.encode_reply(text)
                    return Completion(ids, (0.0,) * len(ids), "stop", 0)
                failure = f"HTTP {response.status_code}: {response.text[:200]}"
                if response.status_code < 500 and response.status_code != 429:
                    break
            except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
                failure = f"{type(error).__name__}: {error}"
        raise EngineError(
            f"the critic at {self.url} does not answer ({failure}); is it running, and is --critic right?"
        )


def connect(url: str, timeout_s: float) -> tuple[httpx2.AsyncClient, str]:
    """A client for the endpoint and the name of the first model it serves. Raises ConfigError when there is none."""
    key = os.environ.get(KEY_ENV)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx2.get(f"{url}/models", headers=headers, timeout=min(timeout_s, 30.0))
        model = str(answer.json()["data"][0]["id"])
    except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"--critic={url}: no OpenAI-compatible endpoint there ({type(error).__name__}: {error}); give the address "
            f"that ends before /chat/completions, e.g. http://host:30000/v1, and a key in {KEY_ENV} if it wants one"
        ) from error
    return httpx2.AsyncClient(headers=headers, timeout=timeout_s), model
