"""Builds a rank's engines, weight sync and episode source from the settings."""

from __future__ import annotations

from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import any_rank
from icrl_megatron.engines.kind import EngineRequest
from icrl_megatron.engines.protocol import Verifiable
from icrl_megatron.engines.rank import Engines, Share
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.engines.sync import WeightSync
from icrl_megatron.model.gpt import DTYPES
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.model.weights import Gatherer
from icrl_megatron.rollout.episode import EpisodeSetup
from icrl_megatron.rollout.external import ExternalSpeaker
from icrl_megatron.rollout.own_model import own_models
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.source import DumpSource, EngineSource, EpisodeSource, FakeSource, NoEngine
from icrl_megatron.rollout.speakers import EmptyCritic, EngineSpeaker, Speaker, SpeakersFor, same_speakers
from icrl_megatron.run.saving import Start
from icrl_megatron.settings.loading import model_folder, run_folder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import registry
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.utils.connections import Connections
from icrl_megatron.utils.progress import Progress


def build_engines(settings: Settings, start: Start, grid: grids.Grid) -> Engines | None:
    """This rank's engines, not ready yet; None in the debug modes that generate nothing."""
    if settings.debug.mode in ("from_dump", "fake_data"):
        return None
    request = EngineRequest(
        settings=settings,
        folder=start.folder,
        grid=grid,
        dtype=DTYPES[settings.actor.precision],
        device=platform.device(),
        logs=run_folder(settings) / "logs",
        weights=start.has_weights,
        critic=start.folder if settings.rollout.critic == "frozen" else None,
    )
    return engine_kind(settings.engine.kind).build(request)


def weight_sync(settings: Settings, gatherer: Gatherer, engines: Engines | None, shape: ModelShape) -> WeightSync:
    """The object that pushes the actor's weights. The first push that reaches every engine is verified, if the engines
    support it."""
    if engines is None:
        return WeightSync(gatherer, NoEngine())
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
    engines: Engines | None,
    sync: WeightSync,
) -> EpisodeSource:
    """The source of episodes for the debug mode."""
    rollout, share = settings.rollout, Share(grid.rank, grid.world)
    if settings.debug.mode == "from_dump":
        return DumpSource(Rollouts(settings.debug.dump), share)
    if engines is None:
        room = rollout.context_tokens - rollout.max_critique_tokens
        # Without a limit on turns, a quarter stays for the rest of the prompt.
        turn = max(1, 3 * room // 4) if rollout.max_turn_tokens is None else rollout.max_turn_tokens
        vocabulary = ModelShape.read(model_folder(settings)).vocab
        return FakeSource(vocabulary, max(1, room - turn) // 2, turn, rollout.max_critique_tokens, share)

    def gather(mine: object) -> list[object]:
        return grids.gather_objects(grid, mine)

    catalogue.lend(own_models(engines, prompter, rollout.context_tokens))
    setup = EpisodeSetup(catalogue.environment, prompter, rollout, drop_too_long=settings.tasks.too_long == "drop")
    speakers_for = _speakers_for(settings, prompter, engines)
    return EngineSource(setup, speakers_for, engines, sync.resend, gather, progress)


def _speakers_for(settings: Settings, prompter: Prompter, engines: Engines) -> SpeakersFor:
    """Who plays which role on this rank. A rank that leads no engine plays no episode."""
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
