"""Builds a rank's part of the SGLang servers: the server that it leads, or a follower of a server that another rank
leads.

Ranks are split into one group of consecutive ranks per server. The first rank of a group leads: it starts and watches
the server, plays the group's share of the tasks, and sends the weights. With `launch.engine_ranks` the server's GPUs
are not those of its group.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from icrl_megatron.engines.flat_buffer import Shapes
from icrl_megatron.engines.kind import EngineRequest, server_share
from icrl_megatron.engines.on_server import icrl_deltas
from icrl_megatron.engines.protocol import EngineError, NoAnswerError
from icrl_megatron.engines.rank import Engines, lead_rank
from icrl_megatron.engines.server_group import ServerGroup
from icrl_megatron.engines.sglang import Follower, SGLangEngine
from icrl_megatron.engines.sglang_checks import require_context
from icrl_megatron.engines.sglang_deltas import DeltaEngine, require_loader
from icrl_megatron.engines.sglang_group import OverGroup
from icrl_megatron.engines.sglang_server import Server, ServerSpec, check_version
from icrl_megatron.engines.sglang_weights import SharedMemory, Transport, WeightSender
from icrl_megatron.model.shape import ModelShape, locate_weights
from icrl_megatron.settings.schema import EngineSettings, Settings
from icrl_megatron.utils.errors import ConfigError

LOOPBACK = "127.0.0.1"


def build(request: EngineRequest) -> Engines:
    """Builds this rank's engines. Starts servers unless they start `in_turn`, and does not wait for them
    (`wait_ready`). Collective over all ranks.

    Raises ConfigError if the settings describe an engine that cannot be built.
    """
    settings, grid, device = request.settings, request.grid, request.device
    in_turn = _in_turn(request)
    share, limit_s = server_share(settings, grid.rank, grid.world), settings.launch.timeout_s
    lead = lead_rank(grid.rank, grid.world, share.count)
    # A rollout process has no other ranks; those that train form the group themselves (`run/build.py`).
    together = in_turn and request.server_device is None
    server_group = ServerGroup.of(grid, share.count, limit_s) if together else ServerGroup(lead=lead)
    group = server_group.handle
    if (number := share.index) is None:
        tensor, sync_s = settings.engine.tensor_parallel, settings.engine.sync_timeout_s
        offers = SharedMemory(None, tensor, group, lead, sync_s) if group else None
        sink = WeightSender(tensor_shapes(request.folder), request.dtype, device, settings.engine.bucket_mib)
        return Engines(Follower(sink, offers), None, None, share, in_turn, server_group)
    if settings.engine.urls:
        solver = _remote_engine(request, number)
    elif request.server_device is not None and settings.launch.engine_ranks:
        solver = _engine_on_engine_ranks(request, number, request.server_device)
    else:
        solver = _own_engine(request, number, group, lead)
    critic = None
    if request.critic is not None:
        log = request.logs / f"sglang_critic_{number}.log"
        spec = replace(server_spec(settings, request.critic, device, log, two=True), keeps_weights=True)
        shapes = tensor_shapes(request.critic)
        critic = SGLangEngine(Server(spec), settings.engine, _no_transport, shapes, request.dtype, device)
    engines = Engines(solver, solver, critic, share, in_turn, server_group)
    if not in_turn:
        engines.start()
    return engines


def _in_turn(request: EngineRequest) -> bool:
    """Whether servers have to start one after another because they share GPUs with the actor or with each other."""
    settings, device = request.settings, request.server_device or request.device
    elsewhere = settings.engine.urls or (request.server_device is not None and settings.launch.engine_ranks)
    if device.type != "cuda" or elsewhere:
        return False
    shared = request.synced or request.critic is not None
    if shared and "expandable_segments:True" in _allocator_settings():
        raise ConfigError(
            "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True: an engine on the actor's GPUs can neither "
            "release nor map such memory; take it out, or use engine.urls"
        )
    return shared


def _own_engine(request: EngineRequest, number: int, group: Any, lead: int) -> SGLangEngine:
    """Creates an engine on a server that this rank starts."""
    settings, log = request.settings, request.logs / f"sglang_{number}.log"
    device = request.server_device or request.device
    spec = server_spec(settings, request.folder, device, log, two=request.critic is not None)
    # Servers that share a GPU sleep in turn when they start, and without a sync no weights are pushed afterwards.
    server = Server(replace(spec, keeps_weights=not request.synced and request.critic is not None))

    def transport() -> Transport:
        return SharedMemory(server, settings.engine.tensor_parallel, group, lead, settings.engine.sync_timeout_s)

    shapes = tensor_shapes(request.folder)
    return SGLangEngine(server, settings.engine, transport, shapes, request.dtype, request.device)


def _remote_engine(request: EngineRequest, number: int) -> SGLangEngine:
    """Creates an engine on a server of `engine.urls`. If no weights are pushed later, sends those of the folder now,
    because it is not known which weights the server has."""
    server, engine = _remote(request.settings, request.settings.engine.urls[number], request.synced)
    solver = _engine_over_group(request, server, engine, _address(server.url))
    if not request.synced:
        solver.update_weights(folder_tensors(request.folder, request.dtype, request.device), version=1)
        if why := solver.lost():
            raise EngineError(why)
    return solver


def _engine_on_engine_ranks(request: EngineRequest, number: int, device: torch.device) -> SGLangEngine:
    """Creates an engine on a server that this rank starts on engine ranks of its machine, from GPU `device` on. It gets
    weights as an external server does."""
    engine, log = request.settings.engine, request.logs / f"sglang_{number}.log"
    spec = server_spec(request.settings, request.folder, device, log, two=False)
    spec = replace(spec, on_engine_ranks=True, loader=icrl_deltas.LOADER if engine.sync == "delta" else "")
    return _engine_over_group(request, Server(spec), engine, LOOPBACK)


def _engine_over_group(request: EngineRequest, server: Server, engine: EngineSettings, host: str) -> SGLangEngine:
    """The engine of a server on other GPUs than those of this rank. `host`: this rank's address toward its workers."""
    device = request.device

    def transport() -> OverGroup:
        return OverGroup(server, engine.tensor_parallel, host, device, engine.sync_timeout_s)

    if request.synced and engine.sync == "delta":
        return DeltaEngine(server, engine, transport, ModelShape.read(request.folder), request.dtype, device)
    return SGLangEngine(server, engine, transport, tensor_shapes(request.folder), request.dtype, device)


def folder_tensors(folder: Path, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor of a Hugging Face folder, one at a time. Raises ConfigError unless it has all of the
    model's."""
    for name, stored in locate_weights(folder, ModelShape.read(folder)).items():
        with safe_open(stored.file, framework="pt", device=str(device)) as file:
            yield name, file.get_tensor(stored.name).to(dtype)


def tensor_shapes(folder: Path) -> Shapes:
    """Shapes of every tensor of a Hugging Face folder's model; a tied model has no head. Raises ConfigError."""
    return ModelShape.read(folder).tensors()


def server_spec(settings: Settings, folder: Path, device: torch.device, log: Path, two: bool) -> ServerSpec:
    """The configuration that a server is started with. `two`: whether two servers share the GPU."""
    engine = settings.engine
    if two:
        engine = replace(engine, memory_fraction=engine.memory_fraction / 2)
    return ServerSpec(
        model=folder,
        settings=engine,
        precision=settings.actor.precision,
        context_tokens=settings.rollout.context_tokens,
        log=log.resolve(),
        on_cpu=device.type == "cpu",
        first_gpu=device.index or 0,
    )


def _remote(settings: Settings, url: str, synced: bool = True) -> tuple[Server, EngineSettings]:
    """Checks a server of `engine.urls`; returns it and the settings with its number of workers. `synced`:
    `EngineRequest.synced`."""
    named = settings.engine.api_key_env
    server = Server(None, url.rstrip("/"), os.environ.get(named, ""))
    try:
        info = server.info()
    except EngineError as error:
        raise ConfigError(f"engine.urls: {error}") from error
    check_version(info.get("version"), settings.engine, url)
    require_context(server, settings.rollout.context_tokens)
    if info.get("preferred_sampling_params"):
        raise ConfigError(
            f"{url} has --preferred-sampling-params {info['preferred_sampling_params']}: log-probs would not be those "
            "of the policy; start it without this option"
        )
    if synced and settings.engine.sync == "delta":
        require_loader(url, info)
    _close_update(server, settings.engine.sync_timeout_s)
    return server, replace(settings.engine, tensor_parallel=int(info.get("tp_size") or 1))


def _close_update(server: Server, timeout_s: float) -> None:
    """Ends an update that a killed run left open, because it blocks new ones. SGLang refuses this if none is open,
    which is fine."""
    try:
        server.post("/end_weight_update", {}, timeout_s)
    except NoAnswerError as error:
        raise ConfigError(f"engine.urls: {error} It may be waiting for a run that has ended: restart it.") from error
    except EngineError as error:
        if "no weight-update session" not in str(error):
            raise ConfigError(f"engine.urls: {error}") from error


def _address(url: str) -> str:
    """The address at which the workers of a remote server reach this rank: that of the interface toward them.

    Raises ConfigError if there is none.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        family, kind, _, _, there = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.urls: {url} cannot be reached ({error})") from error


def _allocator_settings() -> str:
    return os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")


def _no_transport() -> Transport:
    raise EngineError("Weights were sent to the frozen critic.")
