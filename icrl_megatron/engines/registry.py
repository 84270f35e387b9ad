"""Which engine this rank has: its own model, an SGLang server that it leads, or a share of a server that another leads.

Ranks are cut into as many neighbouring groups as there are servers; the first rank of a group leads: it starts and
watches the server, plays the group's share of the tasks, and hands the weights over.
"""

from __future__ import annotations

import datetime
import os
import socket
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from icrl_megatron.distributed.grid import Grid
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.protocol import Engine, EngineError, EngineStats, NoAnswerError, WeightReceiver
from icrl_megatron.engines.server_group import ServerGroup
from icrl_megatron.engines.sglang import Follower, SGLangEngine
from icrl_megatron.engines.sglang_checks import require_context
from icrl_megatron.engines.sglang_server import Server, ServerSpec, check_version
from icrl_megatron.engines.sglang_weights import OverGroup, Shapes, SharedMemory, Sink, Transport
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import EngineSettings, Settings
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """Which tasks a rank plays: every `count`-th from `index` on; none when it leads no engine."""

    index: int | None
    count: int


@dataclass(frozen=True)
class Engines:
    """The engines of one rank."""

    trained: WeightReceiver
    """What weights are synced to."""
    solver: Engine | None
    """The same, where this rank generates."""
    frozen: Engine | None
    """The starting weights, for `rollout.critic=frozen`."""
    share: Share
    in_turn: bool = False
    """On the actor's GPUs, servers allocate memory one at a time: a server sizes its cache by what it finds free,
    and SGLang refuses GPUs that differ. The same on every rank."""
    group: ServerGroup = field(default_factory=ServerGroup)
    """The ranks whose GPUs this rank's server uses."""

    def _served(self) -> list[SGLangEngine]:
        return [e for e in (self.solver, self.frozen) if isinstance(e, SGLangEngine)]

    def start(self) -> None:
        """Starts every server that is this rank's own."""
        for engine in self._served():
            if engine.server.spec is not None:
                engine.server.start()

    def wait_ready(self, tick: Callable[[], None] = lambda: None) -> None:
        """Raises EngineError with the end of the log of a server that does not become ready. Servers `in_turn` are
        started here, one after another, and sleep from then until weights are pushed."""
        for engine in self._served():
            if engine.server.spec is None:
                continue
            if self.in_turn:
                engine.server.start()
            engine.server.wait_ready(tick)
            if self.in_turn:
                engine.sleep()

    def lost(self) -> str:
        """Why an engine of this rank must be revived; empty when none must."""
        return next(filter(None, (engine.lost() for engine in self._served())), "")

    def revive(self) -> bool:
        """Restarts the dead engines of this rank's group. True, on every rank of the group, if the trained one then
        needs the current weights: they offer them together. Raises EngineError on every rank of the group."""
        return self.group.of_lead(self._revive)

    def _revive(self) -> bool:
        stale = isinstance(self.solver, SGLangEngine) and bool(self.solver.lost())
        for engine in self._served():
            if engine.lost():
                engine.revive()
        return stale

    def take_stats(self) -> EngineStats:
        """What this rank's engines counted since the last call."""
        taken = [engine.take_stats() for engine in self._served()]
        return sum(taken, EngineStats())

    def close(self) -> None:
        for engine in (self.solver, self.frozen):
            if engine is not None:
                engine.close()


def lead_rank(rank: int, world: int, servers: int) -> int:
    """The rank that leads the server of `rank`'s group."""
    size = world // servers
    return rank // size * size


def build(
    settings: Settings,
    folder: Path,
    grid: Grid,
    dtype: torch.dtype,
    device: torch.device,
    logs: Path,
    weights: bool = True,
) -> Engines:
    """What this rank leads, started but for `in_turn`, and not waited for (`wait_ready`). All ranks call it together.
    `weights`: whether `folder` has them; a local engine can also begin without and is sent all of them.

    Raises ConfigError where an engine cannot be what the settings ask for.
    """
    engine, frozen = settings.engine, settings.rollout.critic == "frozen"
    if engine.kind == "local":
        local = LocalEngine(folder, engine, dtype, device, weights)
        start = LocalEngine(folder, engine, dtype, device) if frozen else None
        return Engines(local, local, start, Share(grid.rank, grid.world))
    in_turn = device.type == "cuda" and not engine.urls
    if in_turn and "expandable_segments:True" in _allocator_settings():
        raise ConfigError(
            "PYTORCH_CUDA_ALLOC_CONF has expandable_segments:True: such memory can be neither released nor mapped by "
            "an engine beside the actor; take it out, or use engine.urls"
        )
    servers = server_count(settings, grid.world)
    lead, number = lead_rank(grid.rank, grid.world, servers), grid.rank // (grid.world // servers)
    limit_s = settings.launch.timeout_s
    group = _group(grid, servers, limit_s) if in_turn else None
    together = ServerGroup(group, lead, limit_s)
    shapes = tensor_shapes(folder)
    if grid.rank != lead:
        offers = SharedMemory(None, engine.tensor_parallel, group, lead, engine.sync_timeout_s) if group else None
        follower = Follower(Sink(shapes, dtype, device, engine.bucket_mib), offers)
        return Engines(follower, None, None, Share(None, servers), in_turn, together)
    if engine.urls:
        server, engine = _remote(settings, engine.urls[number])
        host = _address(server.url)

        def transport() -> Transport:
            return OverGroup(server, engine.tensor_parallel, host, device, engine.sync_timeout_s)
    else:
        server = Server(_spec(settings, folder, device, logs / f"sglang_{number}.log"))

        def transport() -> Transport:
            return SharedMemory(server, engine.tensor_parallel, group, lead, engine.sync_timeout_s)

    trained = SGLangEngine(server, engine, transport, shapes, dtype, device)
    critic = None
    if frozen:
        log = logs / f"sglang_critic_{number}.log"
        apart = Server(replace(_spec(settings, folder, device, log), keeps_weights=True))
        critic = SGLangEngine(apart, engine, _no_transport, shapes, dtype, device)
    engines = Engines(trained, trained, critic, Share(number, servers), in_turn, together)
    if not in_turn:
        engines.start()
    return engines


def server_count(settings: Settings, world: int) -> int:
    engine = settings.engine
    return len(engine.urls) or engine.servers or max(1, world // engine.tensor_parallel)


def tensor_shapes(folder: Path) -> Shapes:
    """Every tensor of a Hugging Face folder's model with its shape; a tied model has no head. Raises ConfigError."""
    return ModelShape.read(folder).tensors()


def _spec(settings: Settings, folder: Path, device: torch.device, log: Path) -> ServerSpec:
    engine = settings.engine
    if settings.rollout.critic == "frozen":  # two servers share the GPU
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


def _remote(settings: Settings, url: str) -> tuple[Server, EngineSettings]:
    """An external server after it was checked, and the settings with its own number of workers."""
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
            "of the policy; start it without"
        )
    _close_update(server, settings.engine.sync_timeout_s)
    return server, replace(settings.engine, tensor_parallel=int(info.get("tp_size") or 1))


def _close_update(server: Server, timeout_s: float) -> None:
    """Ends the update that a run left open when it was killed: no other could begin. SGLang refuses this where none is
    open, which is well."""
    try:
        server.post("/end_weight_update", {}, timeout_s)
    except NoAnswerError as error:
        raise ConfigError(f"engine.urls: {error} It may wait for a run that is gone: restart it.") from error
    except EngineError as error:
        if "no weight-update session" not in str(error):
            raise ConfigError(f"engine.urls: {error}") from error


def _group(grid: Grid, servers: int, timeout_s: float) -> Any:
    """The host group of the ranks that offer buffers to this rank's server; None where each has its own."""
    size, mine = grid.world // servers, None
    if size > 1:
        for first in range(0, grid.world, size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
            mine = group if grid.rank in ranks else mine
    return mine


def _address(url: str) -> str:
    """Where the workers of a remote server reach this rank: its address on the way to them, whatever its name is.

    Raises ConfigError where there is no way.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        family, kind, _, _, there = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.urls: there is no way to {url} ({error})") from error


def _allocator_settings() -> str:
    return os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get("PYTORCH_ALLOC_CONF", "")


def _no_transport() -> Transport:
    raise EngineError("Weights were sent to the frozen critic.")
