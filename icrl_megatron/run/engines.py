"""Builds a rank's engines and those who speak in its episodes, without Megatron: a rollout process needs no more."""

from __future__ import annotations

import torch

from icrl_megatron.distributed.grid import Grid
from icrl_megatron.distributed.platform import DTYPES
from icrl_megatron.engines.kind import EngineRequest
from icrl_megatron.engines.rank import Engines
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.rollout.external import ExternalSpeaker
from icrl_megatron.rollout.messages import Setup
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import EmptyCritic, EngineSpeaker, Speaker, SpeakersFor, same_speakers
from icrl_megatron.settings.loading import run_folder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.connections import Connections


def build_engines(of: Setup, grid: Grid, device: torch.device) -> Engines:
    """A rank's engines, not ready yet. Collective over the ranks of `grid`."""
    settings = of.settings
    request = EngineRequest(
        settings=settings,
        folder=of.model,
        grid=grid,
        dtype=DTYPES[settings.actor.precision],
        device=device,
        logs=run_folder(settings) / "logs",
        weights=of.has_weights,
        critic=of.model if settings.rollout.critic == "frozen" else None,
        server_device=of.server_device,
    )
    return engine_kind(settings.engine.kind).build(request)


def speakers_for(settings: Settings, prompter: Prompter, engines: Engines) -> SpeakersFor:
    """Who plays which role on a rank. A rank that leads no engine plays no episode."""
    if engines.solver is None:
        return same_speakers(EmptyCritic())
    temperature, stops = settings.rollout.temperature, prompter.stop_ids
    critic: Speaker | None = None
    if engines.frozen is not None:
        critic = EngineSpeaker(engines.frozen, temperature, stops)
    elif settings.rollout.critic == "external":
        external = settings.rollout.external
        critic = ExternalSpeaker(external, temperature, prompter, Connections(external.concurrency))
    elif settings.rollout.critic == "empty":
        critic = EmptyCritic()
    return same_speakers(EngineSpeaker(engines.solver, temperature, stops), critic)
