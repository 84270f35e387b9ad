"""One training rank: `python -m icrl_megatron.train SETTINGS.yaml` builds its components and runs the loop."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from icrl_megatron import loop
from icrl_megatron.actor.actor import Actor
from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.algo.credit import credit
from icrl_megatron.algo.schedules import learning_rate
from icrl_megatron.data.curriculum import Curriculum
from icrl_megatron.data.sampler import TaskSampler, order_seed
from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed.grid import any_rank
from icrl_megatron.distributed.process import StopRequest, run_rank
from icrl_megatron.engines.rank import Engines
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.model.weights import Gatherer
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.rollout.watchdog import WATCHDOG
from icrl_megatron.run import build, saving
from icrl_megatron.run.build import Players
from icrl_megatron.run.evaluator import HeldoutEvaluator
from icrl_megatron.run.joining import joined
from icrl_megatron.run.parts import Parts
from icrl_megatron.run.problems import Problems, chosen
from icrl_megatron.run.recorder import Recorder
from icrl_megatron.run.state import RunState
from icrl_megatron.run.watch import Watch
from icrl_megatron.settings.loading import load_saved, run_folder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import registry
from icrl_megatron.utils.progress import Progress


def main(settings: Settings) -> int:
    """Runs one rank; returns 0 or STOPPED."""
    stop = StopRequest()
    WATCHDOG.obey(stop)
    with joined(settings) as grid:
        return _run(settings, grid, stop)


def _run(settings: Settings, grid: grids.Grid, stop: StopRequest) -> int:
    progress = Progress(enabled=grid.rank == 0)
    start = saving.begin(run_folder(settings), Path(settings.model.path), grid, progress.log)
    saving.require_weights(start, settings)
    tool_cache = ToolCache.of(settings.tasks.tool_cache)
    catalogue = registry.Catalogue(settings.tasks.sources, settings.rollout.max_observation_bytes, tool_cache)
    prompter = Prompter(tokenizer(start.tokenizer), settings.rollout)
    found = chosen(settings, catalogue, prompter, start.model, grid, progress)
    early = engine_kind(settings.engine.kind).before_actor or settings.rollout.staleness > 0
    players = build.build_players(settings, start, grid, progress) if early else None
    try:
        # The same on every rank: those that lead no engine wait with the others.
        first = settings.rollout.interleave or (isinstance(players, Engines) and players.in_turn)
        if first:
            _wait_ready(players, grid, progress)
        actor = Actor(settings, start.folder, grid, weights=start.found is None)
        players = players if early else build.build_players(settings, start, grid, progress)
        if not first:
            _wait_ready(players, grid, progress)
        parts = _parts(settings, grid, actor, catalogue, prompter, players, found, progress, stop)
        saver = saving.Saver(start, actor, settings.checkpoint.keep, progress.log, lambda: bool(stop))
        state = RunState(parts, saver, stop, progress.log)
        evaluator = HeldoutEvaluator(parts, state, found, progress)
        with closing(state), progress.phase(settings.name, settings.steps) as bar, saver.on_error():
            bar.advance(state.step)
            recorder = Recorder(state, progress, bar, prompter.decode, found.dropped)
            return loop.run(parts, state, recorder, evaluator)
    finally:
        if players is not None:
            players.close()


def _wait_ready(players: Players | None, grid: grids.Grid, progress: Progress) -> None:
    if players is not None:  # None on a rank that leads no engine, among others that do
        with progress.phase("engine") as bar:
            players.wait_ready(lambda: bar.advance(0))
    any_rank(grid, False)  # a barrier: a server also uses the GPUs of ranks that do not lead it


def _parts(
    settings: Settings,
    grid: grids.Grid,
    actor: Actor,
    catalogue: registry.Catalogue,
    prompter: Prompter,
    players: Players | None,
    found: Problems,
    progress: Progress,
    stop: StopRequest,
) -> Parts:
    sync = build.weight_sync(settings, Gatherer(actor.rows, grid), players, actor.shape)
    curriculum = Curriculum(settings.tasks.curriculum_floor) if settings.tasks.curriculum else None
    sampler = TaskSampler(settings.tasks.sources, found.train, order_seed(settings), curriculum)
    source = build.episode_source(
        settings, grid, catalogue, prompter, progress, players, sync, sampler, lambda: bool(stop)
    )
    return Parts(
        settings=settings,
        grid=grid,
        actor=actor,
        sync=sync,
        source=source,
        sampler=sampler,
        credit=lambda episodes: credit(episodes, settings.algo, train_critic=settings.rollout.critic == "self"),
        rate=lambda step: learning_rate(step, settings.steps, settings.optim),
        watch=Watch(settings, run_folder(settings), progress.log),
    )


if __name__ == "__main__":
    run_rank(lambda: main(load_saved(Path(sys.argv[1]))))
