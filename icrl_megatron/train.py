"""What torchrun starts: `python -m icrl_megatron.train SETTINGS.yaml` builds one rank's parts and runs the loop."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import AutoTokenizer

from icrl_megatron import loop
from icrl_megatron.actor import grid as grids
from icrl_megatron.actor import platform
from icrl_megatron.actor.actor import Actor
from icrl_megatron.actor.model import DTYPES
from icrl_megatron.actor.sync import WeightSync
from icrl_megatron.actor.weights import Gatherer
from icrl_megatron.config import ConfigError, Settings
from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.launch import StopRequest, report_started, run_rank
from icrl_megatron.parts import Parts, Recorder
from icrl_megatron.rollout import engines as engines_module
from icrl_megatron.rollout.connections import Connections
from icrl_megatron.rollout.engines import Engines
from icrl_megatron.rollout.episode import GuardedEnvironment, Stage, require_room
from icrl_megatron.rollout.evaluate import control
from icrl_megatron.rollout.external import ExternalSpeaker
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.sglang import SGLangEngine
from icrl_megatron.rollout.source import DumpSource, EngineSource, EpisodeSource, FakeSource, NoEngine
from icrl_megatron.rollout.speakers import Casting, EmptyCritic, EngineSpeaker, Speaker, engine_casting
from icrl_megatron.settings import load_saved, run_folder
from icrl_megatron.shape import Qwen3Shape
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.telemetry.files import locked, write_atomically
from icrl_megatron.telemetry.progress import Progress
from icrl_megatron.types import Split, Task

RANK_LOCK = ".lock"


def main(settings: Settings) -> int:
    """One rank of one run; returns 0 or STOPPED."""
    stop = StopRequest()
    with joined(settings) as grid:
        return _run(settings, grid, stop)


@contextmanager
def joined(settings: Settings) -> Iterator[grids.Grid]:
    """This rank's place in the grid, for as long as the job holds its run folder."""
    platform.prepare(settings.launch.device)
    grids.single_process()
    grid = grids.build(settings)
    try:
        # The launcher holds a lock of its own; this one is for ranks that outlive it by a moment, or never had one.
        with locked(run_folder(settings), RANK_LOCK) if grid.rank == 0 else nullcontext():
            if grid.rank == 0:
                report_started()
            yield grid
    finally:
        grids.shutdown()


def _run(settings: Settings, grid: grids.Grid, stop: StopRequest) -> int:
    progress = Progress(enabled=grid.rank == 0)
    folder = Path(settings.model.path)
    prompter = Prompter(tokenizer(folder), settings.rollout)
    check_prompts(settings, prompter, [of[0] for of in problems(settings, "train").values()])
    engines = build_engines(settings, folder, grid)
    try:
        return _train(settings, folder, grid, stop, engines, progress)
    finally:
        if engines is not None:
            engines.close()


def _train(
    settings: Settings, folder: Path, grid: grids.Grid, stop: StopRequest, engines: Engines | None, progress: Progress
) -> int:
    prompter = Prompter(tokenizer(folder), settings.rollout)
    tasks, held = problems(settings, "train"), heldout(settings)
    actor = Actor(settings, folder, grid)
    if engines is not None:
        with progress.phase("engine") as bar:
            engines.wait_ready(lambda: bar.advance(0))
    sync = weight_sync(settings, Gatherer(actor.rows, grid), engines, Qwen3Shape.read(folder).tied)
    parts = Parts(
        settings=settings,
        grid=grid,
        actor=actor,
        sync=sync,
        source=episode_source(settings, folder, grid, prompter, progress, engines, sync),
        sampler=TaskSampler(settings.tasks.sources, tasks, settings.seed),
        heldout=held,
        prompter=prompter,
    )
    recorder = Recorder(parts, run_folder(settings), progress, stop)
    if recorder.step == 0:
        report_control(parts, recorder, "before")
    with progress.phase(settings.name, settings.steps) as recorder.bar:
        recorder.bar.advance(recorder.step)
        code = loop.run(parts, recorder)
    if code == 0:
        report_control(parts, recorder, "after")
    return code


def problems(settings: Settings, split: Split) -> dict[str, list[Task]]:
    """The problems of a split by task source. Raises ConfigError on an empty set, or one too small for a step."""
    found = {s.name: list(registry.get(s.name).problems(split)) for s in settings.tasks.sources}
    for name, tasks in found.items():
        if not tasks:
            raise ConfigError(f"task set {name!r} has no {split} problems; take it out of tasks.sources")
        if split == "train" and settings.tasks.limit is not None:
            found[name] = tasks[: settings.tasks.limit]
        drawn = math.ceil(settings.rollout.tasks_per_step * settings.rollout.oversample)
        if split == "train" and len(found[name]) < drawn:
            raise ConfigError(
                f"task set {name!r} has {len(found[name])} training problems, and a step draws {drawn} "
                f"(rollout.tasks_per_step={settings.rollout.tasks_per_step} x rollout.oversample): raise tasks.limit "
                "or lower the step"
            )
    return found


def heldout(settings: Settings) -> tuple[Task, ...]:
    """The held-out problems of an evaluation: the first `eval.problems` of each source."""
    return tuple(t for tasks in problems(settings, "heldout").values() for t in tasks[: settings.eval.problems])


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder. Raises ConfigError where it is damaged."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ConfigError(
            f"{folder}: the tokenizer cannot be loaded ({error}); copy the model's folder again"
        ) from error


def check_prompts(settings: Settings, prompter: Prompter, tasks: list[Task]) -> None:
    """Raises ConfigError where a prompt does not fit `rollout.context_tokens`, before the model is loaded."""
    for task in tasks:
        with suppress(EnvironmentFailure):  # costs its episodes later, not the run
            environment = GuardedEnvironment(task, registry.environment, settings.rollout.environment_timeout_s)
            problem = asyncio.run(environment.reset())
            require_room(task, "attempt", len(prompter.attempt(problem)), settings.rollout)


def build_engines(settings: Settings, folder: Path, grid: grids.Grid) -> Engines | None:
    """This rank's engines, started but perhaps not ready; None in the debug modes that generate nothing."""
    if settings.debug.mode in ("from_dump", "fake_data"):
        return None
    dtype, logs = DTYPES[settings.actor.precision], run_folder(settings) / "logs"
    return engines_module.build(settings, folder, grid, dtype, platform.device(), logs)


def weight_sync(settings: Settings, gatherer: Gatherer, engines: Engines | None, tied: bool) -> WeightSync:
    """What the actor's weights are pushed with. An engine that is not of this process is asked for checksums once."""
    if engines is None:
        return WeightSync(gatherer, NoEngine())
    if settings.engine.kind == "local" or settings.engine.quantization:  # what was quantised has other values
        return WeightSync(gatherer, engines.trained)

    def verify() -> None:
        stream = gatherer.stream()
        if isinstance(engines.trained, SGLangEngine) and not engines.trained.lost():
            engines.trained.verify(stream, tied)
        for _ in stream:
            pass

    return WeightSync(gatherer, engines.trained, verify=verify)


def episode_source(
    settings: Settings,
    folder: Path,
    grid: grids.Grid,
    prompter: Prompter,
    progress: Progress,
    engines: Engines | None,
    sync: WeightSync,
) -> EpisodeSource:
    """Where episodes come from, by debug mode."""
    rollout = settings.rollout
    if settings.debug.mode == "from_dump":
        return DumpSource(Path(settings.debug.dump))
    if engines is None:
        room = max(1, rollout.context_tokens - rollout.max_turn_tokens - rollout.max_critique_tokens) // 2
        vocabulary = Qwen3Shape.read(folder).vocab
        return FakeSource(vocabulary, room, rollout.max_turn_tokens, rollout.max_critique_tokens)

    def gather(mine: object) -> list[object]:
        return grids.gather_objects(grid, mine)

    stage = Stage(registry.environment, prompter, rollout)
    casting = _casting(settings, prompter, engines)
    return EngineSource(stage, casting, engines, sync.resend, gather, progress)


def _casting(settings: Settings, prompter: Prompter, engines: Engines) -> Casting:
    """Who plays which role on this rank; nobody is asked on a rank that leads no engine."""
    if engines.solver is None:
        return engine_casting(EmptyCritic())
    temperature, stops = settings.rollout.temperature, prompter.stop_ids
    critic: Speaker | None = None
    if engines.frozen is not None:
        critic = EngineSpeaker(engines.frozen, temperature, stops)
    elif settings.rollout.critic == "external":
        external = settings.rollout.external
        critic = ExternalSpeaker(external, temperature, prompter, Connections(external.concurrency))
    elif settings.rollout.critic == "empty":
        critic = EmptyCritic()
    return engine_casting(EngineSpeaker(engines.solver, temperature, stops), critic)


def report_control(parts: Parts, recorder: Recorder, when: str) -> None:
    """control_<when>.json: do retries succeed because of the critique? (`rollout.evaluate.control`, by rank 0.)"""
    settings, path = parts.settings, recorder.run_dir / f"control_{when}.json"
    if settings.eval.control_problems == 0 or not isinstance(parts.source, EngineSource):
        return
    if parts.grid.rank == 0 and not path.exists():
        source, seeds = parts.source, parts.seeds(0, purpose=f"control/{when}")
        found = {}
        with recorder.progress.phase("control"):
            for name, tasks in problems(settings, "heldout").items():
                chosen, limit = tasks[: 2 * settings.eval.control_problems], settings.eval.control_problems
                found[name] = asdict(asyncio.run(control(chosen, limit, source.stage, source.casting, seeds)))
        write_atomically(path, [json.dumps(found, indent=2)])
    dist.barrier(group=parts.grid.host_group)


if __name__ == "__main__":
    run_rank(lambda: main(load_saved(Path(sys.argv[1]))))
