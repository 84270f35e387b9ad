"""What can be known to be wrong with rollouts and engines before anything heavy is imported. Imports no torch."""

from __future__ import annotations

import os
import re
import sys

from icrl_megatron.engines.sglang_server import check_version, installed_version
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings, RolloutSettings, Settings
from icrl_megatron.utils.errors import ConfigError

_OURS = ("--host", "--port", "--api-key", "--admin-api-key", "--config", "--dist-init-addr", "--nnodes")
"""Arguments of a server that would undo what the run says where it listens and who may speak to it."""


def check_rollout(settings: Settings) -> None:
    """Raises ConfigError for partial rollouts, an external critic or a KV cache that lack what they need."""
    _check_partial(settings)
    _check_cache(settings)
    _check_external(settings.rollout)


def _check_partial(settings: Settings) -> None:
    rollout = settings.rollout
    if not rollout.partial:
        return
    if rollout.oversample == 1.0:
        raise ConfigError("rollout.partial=true: nothing is ever cut off; set rollout.oversample above 1, e.g. 1.25")
    if not settings.algo.mismatch_correction.enabled:
        raise ConfigError(
            "rollout.partial=true trains on tokens of older weights: set algo.mismatch_correction.enabled=true, which "
            "weighs them by the log-probs they were sampled with"
        )


def _check_external(rollout: RolloutSettings) -> None:
    external = rollout.external
    if rollout.critic != "external":
        return
    if not external.url.startswith(("http://", "https://")) or not external.model:
        raise ConfigError(
            f"rollout.critic=external needs rollout.external.url and .model (url={external.url!r}, "
            f"model={external.model!r}), e.g. rollout.external.url=http://host:8000/v1"
        )


def _check_cache(settings: Settings) -> None:
    """What a server finds room for is known when it is ready (`sglang_server.require_cache`)."""
    tokens, context = settings.engine.kv_tokens, settings.rollout.context_tokens
    if tokens is not None and tokens < context and settings.engine.kind == "sglang":
        raise ConfigError(
            f"engine.kv_tokens={tokens} holds less than one context (rollout.context_tokens={context}): replies would "
            "be cut; raise it, or lower rollout.context_tokens"
        )


def check_engine(settings: Settings, world: int, on_node: int) -> None:
    """Raises ConfigError where the engine does not fit `world` ranks, `on_node` on each node."""
    engine = settings.engine
    _check_key(engine)
    if engine.kind == "local":
        if engine.tensor_parallel > 1:
            raise ConfigError(f"engine.tensor_parallel={engine.tensor_parallel}: engine.kind=local has only 1")
        if engine.urls or engine.servers:
            raise ConfigError("engine.urls and engine.servers are SGLang's: set engine.kind=sglang, or leave them out")
        return
    if engine.urls:
        _check_urls(settings, world)  # how many GPUs those servers have is their own affair
        return
    _check_groups(settings.engine, world, on_node)
    refused = [a for a in engine.server_args if a.startswith("--preferred-sampling-params")]
    if refused:
        raise ConfigError(f"engine.server_args has {refused[0]}: log-probs would not be those of the policy; drop it")
    for argument in engine.server_args:
        name = argument.partition("=")[0]
        if name in _OURS:
            raise ConfigError(
                f"engine.server_args has {name}, which the run sets itself: its servers listen on loopback, with a key "
                "of their own; drop it, or start the server yourself and name it in engine.urls"
            )


def _check_key(engine: EngineSettings) -> None:
    name = engine.api_key_env
    if not name:
        return
    if not engine.urls:
        raise ConfigError(
            "engine.api_key_env is for servers of engine.urls, and there are none: servers that the run starts have "
            "keys of their own; leave it empty"
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # it may be the key: not repeated
        raise ConfigError(
            "engine.api_key_env is not the name of an environment variable: put the key into one, and its name here"
        )
    if not os.environ.get(name):
        raise ConfigError(
            f"engine.api_key_env={name}: this environment variable is empty or not set; export it, or leave the "
            "setting empty where the servers want no key"
        )


def _check_groups(engine: EngineSettings, world: int, on_node: int) -> None:
    """Each server that the run starts has a group of neighbouring ranks, whose GPUs it uses: they are of one node."""
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
            "would lie on two; use a divisor"
        )
    size = world // servers
    if on_node % size:
        fits = [n for n in range(servers, world + 1) if world % n == 0 and on_node % (world // n) == 0]
        raise ConfigError(
            f"engine.servers={servers} cuts {world} ranks into groups of {size}, and a node has {on_node}: a group "
            f"would lie on two nodes, its server on one; use engine.servers={fits[0]}, or leave it out for one per "
            "engine.tensor_parallel ranks"
        )


def check_engine_split(engine: EngineSettings, shape: ModelShape) -> None:
    """Raises ConfigError if SGLang cannot split the model over the GPUs of a server that the run starts."""
    size = engine.tensor_parallel
    if engine.kind == "local" or engine.urls or shape.splits_over(size):
        return
    fits = " or ".join(str(n) for n in range(1, size) if shape.splits_over(n))
    raise ConfigError(
        f"engine.tensor_parallel={size}: SGLang cannot split the model's {shape.heads} attention heads, "
        f"{shape.kv_heads} key-value heads and MLP width {shape.ffn} over {size} GPUs; {fits} would do"
    )


def check_installed(engine: EngineSettings) -> None:
    """Raises ConfigError where servers of our own would not be the SGLang that was tested."""
    if engine.kind == "sglang" and not engine.urls:
        check_version(installed_version(engine.python), engine, f"engine.python={engine.python or sys.executable}")


def _check_urls(settings: Settings, world: int) -> None:
    urls = settings.engine.urls
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"engine.urls: {url!r} is no address; write http://host:port")
    if world % len(urls) or settings.engine.servers:
        raise ConfigError(
            f"engine.urls names {len(urls)} servers for {world} ranks: their number must divide the ranks, and "
            "engine.servers stay out"
        )
    if settings.rollout.critic == "frozen":
        raise ConfigError(
            "rollout.critic=frozen needs a second server, and engine.urls starts none; leave engine.urls empty, or "
            "use another critic in a new run"
        )
