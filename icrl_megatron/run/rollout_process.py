"""The rollout process of one rank: builds the engine and the task sets, and serves until the rank closes the
connection."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import Failure, Grid
from icrl_megatron.distributed.process import StopRequest
from icrl_megatron.engines.continuing import ContinuingEngine
from icrl_megatron.engines.protocol import Verifiable
from icrl_megatron.engines.rank import Engines
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.rollout.channel import Channel
from icrl_megatron.rollout.episode import EpisodeSetup
from icrl_megatron.rollout.messages import ServiceFailed, Setup, ToService, Update
from icrl_megatron.rollout.own_model import own_models
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.rollout.service import GroupSetup, RolloutService
from icrl_megatron.rollout.service_process import SharedWeights, channel, first_message
from icrl_megatron.rollout.watchdog import WATCHDOG
from icrl_megatron.run.engines import build_engines, speakers_for
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import registry
from icrl_megatron.utils.parent_watch import die_with_parent
from icrl_megatron.utils.terminal import guard

_LAST_MESSAGES_S = 10.0
"""Longest time to send what was not sent yet when the service ends."""


class StopState:
    """Whether the run was asked to stop: by a signal to this process, or by a message of its rank."""

    def __init__(self) -> None:
        self._signalled, self.asked = StopRequest(), False

    def __bool__(self) -> bool:
        return self.asked or bool(self._signalled)


def main(socket_fd: int, weights_fd: int) -> None:
    """Serves one rank. A failure is sent to the rank, which raises it."""
    guard()
    die_with_parent()
    stop = StopState()
    WATCHDOG.obey(stop)
    connection = channel(socket_fd)
    setup = first_message(connection)
    try:
        asyncio.run(_serve(setup, connection, SharedWeights(weights_fd), stop))
    except Exception as error:
        with suppress(OSError):  # the rank is gone
            connection.send(ServiceFailed(Failure.of(error)))
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of environments may still run


async def _serve(of: Setup, connection: Connection, weights: SharedWeights, stop: StopState) -> None:
    settings = of.settings
    platform.return_freed_memory()
    prompter = Prompter(tokenizer(of.tokenizer), settings.rollout)
    tool_cache = ToolCache.of(settings.tasks.tool_cache)
    catalogue = registry.Catalogue(settings.tasks.sources, settings.rollout.max_observation_bytes, tool_cache)
    alone = Grid(of.rank, of.world, 1, 0, 1, 0, of.world, of.rank, None)
    engines = build_engines(of, alone, torch.device("cpu"))
    assert engines.solver is not None  # only ranks that lead an engine have a rollout process
    with closing(engines):
        await asyncio.to_thread(engines.wait_ready)
        solver = ContinuingEngine(engines.solver, prompter.before_stop)  # type: ignore[arg-type]  # EngineKind.pausable
        playing_on = replace(engines, solver=solver)
        catalogue.lend(own_models(playing_on, prompter, settings.rollout.context_tokens))
        drop = settings.tasks.too_long == "drop"
        playing = GroupSetup(
            setup=EpisodeSetup(catalogue.environment, prompter, settings.rollout, drop_too_long=drop),
            speakers_for=speakers_for(settings, prompter, playing_on),
            seed=settings.seed,
            episodes=settings.rollout.episodes_per_task,
            staleness=settings.rollout.staleness,
        )
        installing = _Installing(settings, engines, weights, ModelShape.read(of.model))
        service = RolloutService(engines, solver, playing, installing.install, stop)
        loop = asyncio.get_running_loop()

        def receive(message: ToService | None) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(service.receive, message)

        channel = Channel(connection, receive, lambda: receive(None))
        try:
            await service.serve(channel.send)
        finally:
            channel.finish(_LAST_MESSAGES_S)


class _Installing:
    """Gives weights to the engine, and wakes it if it sleeps. The first ones that it takes are compared with those that
    it has then, if it can be asked for them."""

    def __init__(self, settings: Settings, engines: Engines, weights: SharedWeights, shape: ModelShape) -> None:
        self._engines, self._weights, self._shape = engines, weights, shape
        self._verified = not engine_kind(settings.engine.kind).verifies(settings.engine)

    def install(self, update: Update) -> None:
        trained = self._engines.trained
        trained.wake_weights()
        trained.update_weights(self._weights.read(update.tensors), update.version)
        trained.wake()
        if not self._verified and isinstance(trained, Verifiable):
            self._verified = trained.verify(self._weights.read(update.tensors), self._shape)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
