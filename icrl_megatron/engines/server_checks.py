"""Checks of server settings that do not need a running server. Imports no torch."""

from __future__ import annotations

import os
import re

from icrl_megatron.settings.schema import EngineSettings, Settings
from icrl_megatron.utils.errors import ConfigError


def check_cache(settings: Settings) -> None:
    """Raises ConfigError if `engine.kv_tokens` is less than one context. How many tokens fit on a GPU is known only
    when the server is ready."""
    tokens, context = settings.engine.kv_tokens, settings.rollout.context_tokens
    if tokens is not None and tokens < context:
        raise ConfigError(
            f"engine.kv_tokens={tokens} holds less than one context (rollout.context_tokens={context}): replies would "
            "be cut; raise it, or lower rollout.context_tokens"
        )


def check_key(engine: EngineSettings) -> None:
    """Raises ConfigError if `engine.api_key_env` cannot be used."""
    name = engine.api_key_env
    if not name:
        return
    if not engine.urls:
        raise ConfigError(
            "engine.api_key_env is for servers of engine.urls, and there are none: servers that the run starts have "
            "their own keys; leave it empty"
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # it may be the key itself, so the message omits it
        raise ConfigError(
            "engine.api_key_env is not the name of an environment variable: put the key into one, and its name here"
        )
    if not os.environ.get(name):
        raise ConfigError(
            f"engine.api_key_env={name}: this environment variable is empty or not set; export it, or leave the "
            "setting empty if the servers need no key"
        )


def check_sync(settings: Settings, deltas: bool) -> None:
    """Raises ConfigError if deltas cannot be sent. `deltas`: whether the kind of engine can take them."""
    engine = settings.engine
    if engine.sync != "delta":
        return
    if not deltas:
        raise ConfigError(
            f"engine.sync=delta: engine.kind={engine.kind} takes only whole weights; use engine.sync=full"
        )
    if not engine.urls and not settings.launch.engine_ranks:
        raise ConfigError(
            "engine.sync=delta is for servers of engine.urls or launch.engine_ranks: servers on the trainer's GPUs "
            "read the weights from memory of this machine; use engine.sync=full, or name servers in engine.urls"
        )
    if engine.quantization:
        raise ConfigError(
            f"engine.sync=delta: with engine.quantization={engine.quantization} the server's weights are not those "
            "that were sent, and differences cannot be added to them; use engine.sync=full"
        )


def check_groups(engine: EngineSettings, world: int, on_node: int) -> None:
    """Raises ConfigError if the servers that the run starts cannot be divided among the ranks. Each server uses the
    GPUs of a group of consecutive ranks on one node."""
    if world % engine.tensor_parallel:
        raise ConfigError(
            f"engine.tensor_parallel={engine.tensor_parallel} does not divide the {world} ranks; lower it to a "
            "divisor, or raise launch.ranks"
        )
    servers = engine.servers or max(1, world // engine.tensor_parallel)
    if world % servers or world // servers < engine.tensor_parallel:
        raise ConfigError(
            f"engine.servers={servers} of engine.tensor_parallel={engine.tensor_parallel} do not share {world} ranks "
            "evenly; leave engine.servers out for one per engine.tensor_parallel ranks"
        )
    if on_node % engine.tensor_parallel:
        raise ConfigError(
            f"engine.tensor_parallel={engine.tensor_parallel} does not divide the {on_node} ranks of a node: a server "
            "would span two; use a divisor"
        )
    size = world // servers
    if on_node % size:
        fits = [n for n in range(servers, world + 1) if world % n == 0 and on_node % (world // n) == 0]
        raise ConfigError(
            f"engine.servers={servers} splits {world} ranks into groups of {size}, and a node has {on_node}: a group "
            f"would span two nodes, but a server runs on one; use engine.servers={fits[0]}, or leave it out for one "
            "per engine.tensor_parallel ranks"
        )


def check_urls(settings: Settings, world: int) -> None:
    """Raises ConfigError if the servers of `engine.urls` cannot serve `world` ranks."""
    urls = settings.engine.urls
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"engine.urls: {url!r} is not an address; write http://host:port")
    if world % len(urls) or settings.engine.servers:
        raise ConfigError(
            f"engine.urls names {len(urls)} servers for {world} ranks: their number must divide the ranks, and "
            "engine.servers must be unset"
        )
    if settings.rollout.critic == "frozen":
        raise ConfigError(
            "rollout.critic=frozen needs a second server, and engine.urls starts none; leave engine.urls empty, or "
            "use another critic in a new run"
        )
