"""The SGLang server that `icrl distill` starts for the agents of an endpoint system, on a model folder of the user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from icrl_megatron.distill.roles import ROLES
from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.model.shape import check_folder
from icrl_megatron.settings.distill_schema import DistillEndpoint
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.progress import Progress

KEY_ENV = "ICRL_DISTILL_KEY"
"""The variable of this process that holds the server's key while the server runs. Servers do not inherit it."""
NOT_STARTED = "http://127.0.0.1"
"""The address of a server that does not run yet."""


def wanted(settings: Settings) -> bool:
    """Whether the system's endpoint is a server of the command's own."""
    distill, engine = settings.distill, settings.engine
    if distill.system != "endpoint" or distill.endpoint.url or engine.kind != "sglang" or engine.urls:
        return False
    elsewhere = {agent.name for agent in distill.agents if agent.url}
    return not elsewhere > set(ROLES) or len(elsewhere) < len(distill.agents)


def planned(settings: Settings) -> Settings:
    """The settings with the endpoint that the server will be, without its address.

    Raises ConfigError if a server could not be started with these settings."""
    if not settings.model.path:
        raise ConfigError(
            "distill.system=endpoint with engine.kind=sglang starts a server, and model.path is empty: set model.path "
            "to the agents' model, or distill.endpoint.url to the address of a running server"
        )
    check_engine(settings)
    name = settings.distill.endpoint.model or settings.model.path
    return _at(settings, replace(settings.distill.endpoint, url=NOT_STARTED, model=name, api_key_env=KEY_ENV))


def check_engine(settings: Settings) -> None:
    """Raises ConfigError if an engine of this process could not be started on `model.path`."""
    kind, size = engine_kind(settings.engine.kind), settings.engine.tensor_parallel
    shape = check_folder(Path(settings.model.path))
    kind.check(settings)
    kind.check_ranks(settings, size, size)
    kind.check_shape(settings.engine, shape)
    kind.check_installed(settings.engine)


@contextmanager
def serving(settings: Settings, log: Path, progress: Progress) -> Iterator[Settings]:
    """Starts a server with planned settings and yields the settings with its address. It ends with the block.

    Raises HopelessError if it does not start, and ConfigError if its cache is too small."""
    from icrl_megatron.distributed import platform  # lazy: imports torch
    from icrl_megatron.engines.sglang_build import server_spec
    from icrl_megatron.engines.sglang_server import Server

    device = platform.prepare(settings.launch.device)
    server = Server(server_spec(settings, Path(settings.model.path), device, log, two=False))
    try:
        with progress.phase("server") as bar:
            server.start()
            server.wait_ready(lambda: bar.advance(0))
        os.environ[KEY_ENV] = server.key
        yield _at(settings, replace(settings.distill.endpoint, url=f"{server.url}/v1"))
    except EngineError as error:
        raise HopelessError(str(error)) from error
    finally:
        os.environ.pop(KEY_ENV, None)
        server.kill()


def _at(settings: Settings, endpoint: DistillEndpoint) -> Settings:
    return replace(settings, distill=replace(settings.distill, endpoint=endpoint))
