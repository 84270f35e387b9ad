"""One rank: `python -m icrl_megatron.train SETTINGS.yaml` builds its parts and runs the loop."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icrl_megatron import loop
from icrl_megatron.actor.actor import Actor
from icrl_megatron.data.curriculum import Curriculum
from icrl_megatron.data.sampler import TaskSampler, order_seed
from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed.grid import any_rank
from icrl_megatron.distributed.process import StopRequest, run_rank
from icrl_megatron.engines.protocol import EngineLostError
from icrl_megatron.engines.registry import Engines
from icrl_megatron.evaluation.control import ControlState, control
from icrl_megatron.model.shape import Qwen3Shape
from icrl_megatron.model.weights import Gatherer
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.rollout.source import EngineSource
from icrl_megatron.rollout.watchdog import WATCHDOG
from icrl_megatron.run import build as wiring
from icrl_megatron.run import problems, saving
from icrl_megatron.run.joining import joined
from icrl_megatron.run.parts import Parts, Recorder
from icrl_megatron.run.problems import Problems, Share
from icrl_megatron.run.watch import Watch
from icrl_megatron.settings.loading import load_saved, run_folder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import registry
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.progress import Progress


def main(settings: Settings) -> int:
    """One rank of one run; returns 0 or STOPPED."""
    stop = StopRequest()
    WATCHDOG.obey(stop)
    with joined(settings) as grid:
        return _run(settings, grid, stop)


def _run(settings: Settings, grid: grids.Grid, stop: StopRequest) -> int:
    progress = Progress(enabled=grid.rank == 0)
    start = saving.begin(run_folder(settings), Path(settings.model.path), grid, progress.log)
    saving.require_weights(start, settings)
    catalogue = registry.Catalogue(settings.tasks.sources, settings.rollout.max_observation_bytes)
    prompter = Prompter(tokenizer(start.tokenizer), settings.rollout)
    found = chosen(settings, catalogue, prompter, start.model, grid, progress)
    curriculum = Curriculum(settings.tasks.curriculum_floor) if settings.tasks.curriculum else None
    sampler = TaskSampler(settings.tasks.sources, found.train, order_seed(settings), curriculum)
    # Servers start while the actor is built, where they do not take its memory. An engine in this process waits for the
    # actor, which says best what is wrong with a model.
    served = settings.engine.kind == "sglang"
    engines = wiring.build_engines(settings, start, grid) if served else None
    try:
        first = engines is not None and engines.in_turn
        if first:
            _wait_ready(engines, grid, progress)
        actor = Actor(settings, start.folder, grid, weights=start.found is None)
        engines = engines if served else wiring.build_engines(settings, start, grid)
        if not first:
            _wait_ready(engines, grid, progress)
        parts = _parts(settings, grid, actor, catalogue, prompter, engines, sampler, found, progress)
        saver = saving.Saver(start, actor, settings.checkpoint.keep, progress.log, lambda: bool(stop))
        return _train(parts, found, Recorder(parts, saver, progress, stop))
    finally:
        if engines is not None:
            engines.close()


def _wait_ready(engines: Engines | None, grid: grids.Grid, progress: Progress) -> None:
    if engines is not None:
        with progress.phase("engine") as bar:
            engines.wait_ready(lambda: bar.advance(0))
        any_rank(grid, False)  # a server's GPUs are those of ranks that do not lead it, too


def _parts(
    settings: Settings,
    grid: grids.Grid,
    actor: Actor,
    catalogue: registry.Catalogue,
    prompter: Prompter,
    engines: Engines | None,
    sampler: TaskSampler,
    found: Problems,
    progress: Progress,
) -> Parts:
    sync = wiring.weight_sync(settings, Gatherer(actor.rows, grid), engines, actor.shape.tied)
    return Parts(
        settings=settings,
        grid=grid,
        actor=actor,
        sync=sync,
        source=wiring.episode_source(settings, grid, catalogue, prompter, progress, engines, sync),
        sampler=sampler,
        heldout=found.evaluated(settings.eval.problems),
        prompter=prompter,
        watch=Watch(settings, run_folder(settings), progress.log),
        dropped_too_long=found.dropped,
    )


def chosen(
    settings: Settings,
    catalogue: registry.Catalogue,
    prompter: Prompter,
    folder: Path,
    grid: grids.Grid,
    progress: Progress,
) -> Problems:
    """The problems of the run that fit the context of the model in `folder`; every rank examines its share. Raises
    ConfigError as `problems.fitting` does."""
    found = problems.read(settings, catalogue)
    share = Share(grid.rank, grid.world, lambda mine: grids.gather_objects(grid, mine))
    positions = Qwen3Shape.read(folder).max_positions
    return problems.fitting(found, settings, catalogue, prompter, positions, share, progress.log)


def _train(parts: Parts, found: Problems, recorder: Recorder) -> int:
    settings = parts.settings
    if recorder.step == 0:
        report_control(parts, found, recorder, "before")
    with recorder.progress.phase(settings.name, settings.steps) as recorder.bar, recorder.saver.on_error():
        recorder.bar.advance(recorder.step)
        code = loop.run(parts, recorder)
    if code == 0:
        report_control(parts, found, recorder, "after")
    return code


def report_control(parts: Parts, found: Problems, recorder: Recorder, when: str) -> None:
    """control_<when>.json: do retries succeed because of the critique? (`evaluation.control.control`, by rank 0.)"""
    settings, path = parts.settings, recorder.run_dir / f"control_{when}.json"
    if settings.eval.control_problems == 0 or not isinstance(parts.source, EngineSource):
        return
    source, seeds = parts.source, parts.seeds(0, purpose=f"control/{when}")
    mine = parts.grid.rank == 0 and not path.exists()
    todo = found.heldout if mine else {}
    states = {name: ControlState() for name in todo}
    results: dict[str, Any] = {}

    def go_on() -> int:
        for name in (n for n in todo if n not in results):
            tried, limit = todo[name][: 2 * settings.eval.control_problems], settings.eval.control_problems
            played = control(tried, limit, source.stage, source.casting, seeds, states[name])
            try:
                results[name] = asdict(asyncio.run(played))
            except EngineLostError:
                break
        return len(todo) - len(results)

    with recorder.progress.phase("control"):
        source.survive(len(todo), go_on)
    if mine:
        write_atomically(path, [json.dumps(results, indent=2)], "the control")


if __name__ == "__main__":
    run_rank(lambda: main(load_saved(Path(sys.argv[1]))))
