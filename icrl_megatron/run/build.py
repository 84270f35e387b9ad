"""Builds what plays a rank's episodes, its weight sync and its episode source from the settings."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed import job_size, platform
from icrl_megatron.distributed.grid import any_rank
from icrl_megatron.distributed.platform import DTYPES
from icrl_megatron.engines.engine_ranks import EngineRanks
from icrl_megatron.engines.protocol import Verifiable
from icrl_megatron.engines.rank import Engines, Share
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.engines.server_group import ServerGroup
from icrl_megatron.engines.sync import WeightSync
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.model.weights import Gatherer
from icrl_megatron.rollout.async_source import AsyncSource, Order
from icrl_megatron.rollout.episode import EpisodeSetup
from icrl_megatron.rollout.fixed_sources import DumpSource, FakeSource, NoEngine
from icrl_megatron.rollout.journal import Journal
from icrl_megatron.rollout.messages import Setup
from icrl_megatron.rollout.own_model import own_models
from icrl_megatron.rollout.played import EpisodeSource
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.service_process import RolloutProcess
from icrl_megatron.rollout.source import EngineSource
from icrl_megatron.run.engines import build_engines, speakers_for
from icrl_megatron.run.rollout_checks import check_own_gpus
from icrl_megatron.run.saving import Start
from icrl_megatron.settings.loading import model_folder, run_folder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import registry
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.types import Task
from icrl_megatron.utils.progress import Progress

Players = Engines | RolloutProcess
"""What plays a rank's episodes: its engines, or the process that has them (`rollout.staleness`)."""
HANG_S = 120.0
"""A rollout process that says nothing for this much longer than a call of an environment may take is killed."""


def build_players(settings: Settings, start: Start, grid: grids.Grid, progress: Progress) -> Players | None:
    """What plays this rank's episodes, not ready yet. None in the debug modes that generate nothing, and on a rank of
    an asynchronous run that leads no engine. Raises ConfigError if the engine would share GPUs with an actor that it
    cannot wait for."""
    if not settings.debug.generates():
        return None
    check_own_gpus(settings, platform.device().type)
    server_device = _server_device(settings)
    setup = Setup(settings, start.folder, start.has_weights, start.tokenizer, grid.rank, grid.world, server_device)
    if not settings.rollout.staleness:
        return build_engines(setup, grid, platform.device())
    if engine_kind(settings.engine.kind).share(settings, grid.rank, grid.world).index is None:
        return None
    return RolloutProcess(
        setup,
        "icrl_megatron.run.rollout_process",
        ModelShape.read(start.folder).tensors(),
        DTYPES[settings.actor.precision],
        HANG_S + settings.rollout.environment_timeout_s,
        progress.log,
    )


def _server_device(settings: Settings) -> torch.device | None:
    """Where the server of this rank's group runs, if a rollout process starts it."""
    device = platform.device()
    if settings.rollout.interleave:
        return device
    if not settings.launch.engine_ranks:
        return None
    if device.type == "cpu":
        return device
    ranks = EngineRanks.of(settings, job_size.ranks_on_node(settings))
    return torch.device("cuda", ranks.first_gpu(device.index or 0))


def weight_sync(settings: Settings, gatherer: Gatherer, engines: Players | None, shape: ModelShape) -> WeightSync:
    """The object that pushes the actor's weights. The first push that reaches every engine is verified, if the engines
    support it."""
    if settings.rollout.interleave:
        grid, kind = gatherer.grid, engine_kind(settings.engine.kind)
        servers = kind.share(settings, grid.rank, grid.world).count
        group = ServerGroup.of(grid, servers, settings.launch.timeout_s)
        assert not isinstance(engines, Engines)
        return WeightSync(gatherer, engines or NoEngine(), barrier=group.barrier)
    if engines is None:
        return WeightSync(gatherer, NoEngine())
    if isinstance(engines, RolloutProcess):  # it verifies them itself
        return WeightSync(gatherer, engines)
    if not engine_kind(settings.engine.kind).verifies(settings.engine):
        return WeightSync(gatherer, engines.trained, frozen=engines.frozen, barrier=engines.group.barrier)

    def verify() -> bool:
        stream, same = gatherer.stream(), True
        if isinstance(engines.trained, Verifiable):
            same = engines.trained.verify(stream, shape)
        for _ in stream:
            pass
        return not any_rank(gatherer.grid, not same)

    return WeightSync(gatherer, engines.trained, verify, engines.frozen, engines.group.barrier)


def episode_source(
    settings: Settings,
    grid: grids.Grid,
    catalogue: registry.Catalogue,
    prompter: Prompter,
    progress: Progress,
    players: Players | None,
    sync: WeightSync,
    sampler: TaskSampler,
    stopping: Callable[[], bool],
) -> EpisodeSource:
    """The source of episodes for the debug mode and `rollout.staleness`."""
    rollout, share = settings.rollout, Share(grid.rank, grid.world)
    if settings.debug.mode == "from_dump":
        return DumpSource(Rollouts(settings.debug.dump), share)
    if settings.debug.mode == "fake_data":
        room = rollout.context_tokens - rollout.max_critique_tokens
        # Without a limit on turns, a quarter stays for the rest of the prompt.
        turn = max(1, 3 * room // 4) if rollout.max_turn_tokens is None else rollout.max_turn_tokens
        vocabulary = ModelShape.read(model_folder(settings)).vocab
        return FakeSource(vocabulary, max(1, room - turn) // 2, turn, rollout.max_critique_tokens, share)

    def gather(mine: object) -> list[object]:
        return grids.gather_objects(grid, mine)

    if rollout.staleness:
        assert not isinstance(players, Engines)
        share = engine_kind(settings.engine.kind).share(settings, grid.rank, grid.world)
        order, version = _order(settings, sampler), lambda: sync.version
        episodes = rollout.episodes_per_task
        return AsyncSource(players, share, order, episodes, version, sync.resend, gather, progress, stopping)
    assert isinstance(players, Engines)
    catalogue.lend(own_models(players, prompter, rollout.context_tokens))
    setup = EpisodeSetup(catalogue.environment, prompter, rollout, drop_too_long=settings.tasks.too_long == "drop")
    source = EngineSource(setup, speakers_for(settings, prompter, players), players, sync.resend, gather, progress)
    if settings.checkpoint.episodes and players.share.index is not None:
        source.journal = Journal(run_folder(settings), grid.rank, grid.world)
    return source


def _order(settings: Settings, sampler: TaskSampler) -> Order:
    rollout = settings.rollout

    @lru_cache(rollout.staleness + 2)
    def drawn(step: int) -> list[Task]:
        return sampler.draw(step, 0, rollout.tasks_per_step)

    def task(number: int) -> Task:
        step, place = divmod(number, rollout.tasks_per_step)
        return drawn(step)[place]

    return Order(task, rollout.tasks_per_step, settings.steps, rollout.staleness, rollout.turns_at)
