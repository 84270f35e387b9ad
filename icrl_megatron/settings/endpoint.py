"""Settings of a model behind an OpenAI-compatible endpoint, which is never trained: a critic, a judge, an agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from icrl_megatron.settings.limits import Range


@dataclass
class Endpoint:
    url: str = ""
    """Base URL of the server, without /chat/completions, e.g. http://host:8000/v1."""
    model: str = ""
    """Name of the model in the requests."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that contains the API key. It may be unset if the server needs no key."""
    timeout_s: Annotated[float, Range(1e-3)] = 120.0
    """Time limit of one request, in seconds. Up to three retries of a judge must fit rollout.environment_timeout_s."""
    concurrency: Annotated[int, Range(1)] = 32
    """Largest number of requests of a rank at the same time."""
