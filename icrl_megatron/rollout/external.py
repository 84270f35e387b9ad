"""A critic behind any OpenAI-compatible endpoint: the frozen-critic baseline, and the critic swap in evaluation."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import aiohttp

from icrl_megatron.engines.protocol import RequestFailedError
from icrl_megatron.rollout.prompts import CHARS_A_TOKEN, Prompter
from icrl_megatron.rollout.speakers import Ask
from icrl_megatron.settings.endpoint import Endpoint
from icrl_megatron.tasks.base import sendable
from icrl_megatron.types import Completion, id_array, logprob_array
from icrl_megatron.utils import connections
from icrl_megatron.utils.connections import Connections
from icrl_megatron.utils.endpoint import EndpointClient, EndpointError, authorization
from icrl_megatron.utils.errors import ConfigError

_MODELS_BYTES = 16 << 20
"""The longest list of models that is read."""


@dataclass(frozen=True)
class ExternalSpeaker:
    """A critic only. Its text is encoded once with the solver's tokenizer, with log-probs of 0, because the solver
    reads it and it is never trained on."""

    settings: Endpoint
    temperature: float
    prompter: Prompter
    connections: Connections

    async def reply(self, ask: Ask) -> Completion:
        """Returns no tokens, with finish reason "abort", if it is interrupted: an endpoint returns no partial answers.

        Raises RequestFailedError if the endpoint refuses, or still fails after the last retry.
        """
        external, link = self.settings, self.connections.here()
        client = EndpointClient(
            external.url, external.model, external.api_key_env, external.timeout_s, self.connections
        )
        asked = asyncio.ensure_future(client.ask(ask.message, ask.max_new_tokens, self.temperature, ask.seed))
        interrupted = asyncio.ensure_future(link.interrupted.wait())
        try:
            await asyncio.wait({asked, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                return Completion(id_array(()), logprob_array(()), "abort", 0)
            text = sendable(asked.result())
        except EndpointError as error:
            raise RequestFailedError(f"The external critic {error}") from error
        finally:
            asked.cancel()
            interrupted.cancel()
        # An endpoint that ignores max_tokens may send megabytes, which take seconds to encode.
        begin = text[: CHARS_A_TOKEN * ask.max_new_tokens]
        ids = self.prompter.encode_reply(begin)
        cut = ids[: ask.max_new_tokens]
        whole = len(begin) == len(text) and len(cut) == len(ids)
        return Completion(id_array(cut), logprob_array([0.0] * len(cut)), "stop" if whole else "length", 0)

    async def interrupt(self) -> None:
        self.connections.here().interrupted.set()


def first_model(settings: Endpoint) -> str:
    """The name of the first model that the endpoint serves. Raises ConfigError if there is none."""

    async def models() -> bytes:
        url, limit = f"{settings.url.rstrip('/')}/models", aiohttp.ClientTimeout(total=min(settings.timeout_s, 30.0))
        async with connections.open_session() as session:
            async with session.get(url, headers=authorization(settings.api_key_env), timeout=limit) as reply:
                return await connections.body(reply, _MODELS_BYTES)

    try:
        return str(json.loads(asyncio.run(models()))["data"][0]["id"])
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--critic={settings.url}: no OpenAI-compatible endpoint there ({type(error).__name__}: {error}); give the "
            f"base URL without /chat/completions, e.g. http://host:30000/v1, and put the key, if it needs one, in "
            f"{settings.api_key_env}"
        ) from error
