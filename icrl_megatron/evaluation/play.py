"""One rank of `icrl eval` or `icrl select`: plays its share of the problems on its engine. Rank 0 writes and prints the
result of an evaluation; each rank of `icrl select` records its questions (`measured.py`).

python -m icrl_megatron.evaluation.play JOB.json
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.distributed.platform import DTYPES
from icrl_megatron.distributed.process import STOP_ENV, STOPPED, leave_outcome, report_started, run_rank
from icrl_megatron.engines.kind import EngineRequest
from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.engines.rank import Engines
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.evaluation import measured
from icrl_megatron.evaluation.job import EvalJob
from icrl_megatron.evaluation.measured import SEEDS, Playing
from icrl_megatron.evaluation.result import PICTURE, RESULT, Result, read_result
from icrl_megatron.evaluation.scores import compare, score, successes
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.rollout.context_budget import TooLongError
from icrl_megatron.rollout.episode import EpisodeSetup
from icrl_megatron.rollout.external import ExternalSpeaker, first_model
from icrl_megatron.rollout.own_model import own_models
from icrl_megatron.rollout.played import Played, RolloutRequest
from icrl_megatron.rollout.prompts import Prompter, tokenizer
from icrl_megatron.rollout.source import EngineSource
from icrl_megatron.rollout.speakers import EmptyCritic, EngineSpeaker, Speaker, SpeakersFor, same_speakers
from icrl_megatron.run.problems import ProblemShare, examine, left_out, refusal
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.datasets import content_hash, subset_of
from icrl_megatron.telemetry.dump_shards import ROLLOUTS_FOLDER
from icrl_megatron.telemetry.dumps import write_dump
from icrl_megatron.types import Episode, Task
from icrl_megatron.utils import results
from icrl_megatron.utils.connections import Connections
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.progress import Progress


def run(job: EvalJob) -> None:
    """Plays the job on all ranks, which must all call this; rank 0 writes and prints the result.

    Raises ConfigError if problems are too long or the engine does not support the settings, and HopelessError if an
    engine fails.
    """
    platform.prepare(job.settings.launch.device)
    try:
        with _joined(job) as grid, _playing(job, grid, Progress(enabled=grid.rank == 0)) as playing:
            if job.records is not None:
                measured.record(job.records, job.request.samples, playing, first=grid.rank == 0)
                return
            begun = time.perf_counter()
            played = playing.source.play(
                RolloutRequest(playing.tasks, job.request.samples, SEEDS, job.settings.rollout.rounds)
            )
            seconds = time.perf_counter() - begun
            unsaved = [why for why in playing.source.gather(_dump(job, played.episodes, grid.rank)) if why]
    except EngineError as error:
        raise HopelessError(str(error)) from error
    if grid.rank == 0:
        from icrl_megatron.evaluation.views import show  # imports matplotlib, which other ranks do not need

        result = replace(_result(job, played), too_long=len(playing.too_long), seconds=seconds)
        _write(result, job)
        for why in unsaved[:1]:
            print(f"warning: not all episodes are saved: {why}", file=sys.stderr)
        show(result)
        print(f"written to {job.out}: {RESULT}, {PICTURE}, {ROLLOUTS_FOLDER}/ (icrl show {shlex.quote(str(job.out))})")


@contextmanager
def _joined(job: EvalJob) -> Iterator[Grid]:
    """The grid of the evaluation's ranks; the process group is destroyed when the block ends."""
    grid = grids.without_model(job.settings)
    try:
        if grid.rank == 0:
            report_started()
        yield grid
    finally:
        if dist.is_initialized() and grid.world > 1:
            dist.destroy_process_group()


@contextmanager
def _playing(job: EvalJob, grid: Grid, progress: Progress) -> Iterator[Playing]:
    """The source and the problems that fit the context; the engines are closed when the block ends."""

    def gather(mine: Any) -> list[Any]:
        return [mine] if grid.world == 1 else grids.gather_objects(grid, mine)

    shape = ModelShape.read(job.folder)
    rollout = job.settings.rollout
    rollout = replace(rollout, context_tokens=min(rollout.context_tokens, shape.max_positions))
    settings = replace(job.settings, rollout=rollout)
    prompter = Prompter(tokenizer(job.folder), rollout)
    _check_critic(job)
    tool_cache = ToolCache.of(settings.tasks.tool_cache)
    catalogue = registry.Catalogue(settings.tasks.sources, rollout.max_observation_bytes, tool_cache)
    share = ProblemShare(grid.rank, grid.world, gather)
    tasks = _fitting(replace(job, settings=settings), catalogue, prompter, share, shape.max_positions, progress)
    setup = EpisodeSetup(
        catalogue.environment, prompter, rollout, job.request.revise_successes, settings.tasks.too_long == "drop"
    )
    request = EngineRequest(
        settings=settings,
        folder=job.folder,
        grid=grid,
        dtype=DTYPES[settings.actor.precision],
        device=platform.device(),
        logs=job.logs,
        critic=job.critic,
        synced=False,
    )
    # Built first, so that an endpoint that does not answer ends the evaluation before an engine is built.
    speakers = _EvaluationSpeakers(job, prompter)
    with closing(engine_kind(settings.engine.kind).build(request)) as engines:
        with progress.phase("engine") as bar:
            engines.wait_ready(lambda: bar.advance(0))
            engines.wake()
        catalogue.lend(own_models(engines, prompter, rollout.context_tokens))
        source = EngineSource(setup, speakers.on(engines), engines, lambda stale: None, gather, progress)
        kept = {task.task_id for task in tasks}
        yield Playing(source, tuple(tasks), tuple(task for task in job.tasks if task.task_id not in kept))


class _EvaluationSpeakers:
    """Who speaks in the episodes of an evaluation."""

    def __init__(self, job: EvalJob, prompter: Prompter) -> None:
        """Raises ConfigError if the critic's endpoint does not answer."""
        rollout, address = job.settings.rollout, job.request.critic_address()
        self._temperature, self._stops = rollout.temperature, prompter.stop_ids
        self._external: Speaker | None = None
        if address:
            external = replace(rollout.external, url=address.rstrip("/"))
            external = replace(external, model=first_model(external))
            connections = Connections(external.concurrency)
            self._external = ExternalSpeaker(external, rollout.temperature, prompter, connections)

    def on(self, engines: Engines) -> SpeakersFor:
        """The speakers with a rank's engines; a rank without an engine plays no episode."""
        if engines.solver is None:
            return same_speakers(EmptyCritic())
        critic = self._external
        if engines.frozen is not None:
            critic = EngineSpeaker(engines.frozen, self._temperature, self._stops)
        return same_speakers(EngineSpeaker(engines.solver, self._temperature, self._stops), critic)


def _check_critic(job: EvalJob) -> None:
    if job.critic is not None and tokenizer(job.critic).get_vocab() != tokenizer(job.folder).get_vocab():
        raise ConfigError(
            f"--critic={job.request.critic} has another tokenizer than {job.request.model}: serve it behind an "
            "OpenAI-compatible endpoint and give its address"
        )


def _fitting(
    job: EvalJob,
    catalogue: registry.Catalogue,
    prompter: Prompter,
    share: ProblemShare,
    positions: int,
    progress: Progress,
) -> list[Task]:
    """The problems that fit the context. Raises TooLongError if none fits, or if some do not and `tasks.too_long` is
    "error"."""
    settings = replace(job.settings, eval=replace(job.settings.eval, control_problems=0, rounds=1))
    lost = examine(job.tasks, settings, catalogue, prompter, share)
    if not lost:
        return list(job.tasks)
    if settings.tasks.too_long == "error" or len(lost) == len(job.tasks):
        raise TooLongError(refusal(lost, len(job.tasks), settings, positions))
    progress.log(left_out(lost, len(job.tasks), settings))
    ids = {one.task.task_id for one in lost}
    return [task for task in job.tasks if task.task_id not in ids]


def _result(job: EvalJob, played: Played) -> Result:
    request, rounds, episodes = job.request, job.settings.rollout.rounds, played.headers
    result = Result(
        model=str(request.model),
        critic=request.critic or "itself",
        rounds=rounds,
        samples=request.samples,
        scores=score(episodes, played.dropped, rounds),
        generated_tokens=played.used_tokens(),
        successes=successes(episodes, request.samples),
        subsets={e.task.task_id: subset_of(e.task) for e in episodes},
        contents={e.task.task_id: content_hash(e.task.problem) for e in episodes},
        unusable=dict(job.unusable),
        lost=tuple(dict.fromkeys(d.error for d in played.dropped))[:3],
    )
    if request.against is None:
        return result
    earlier, costs = read_result(request.against)
    found = compare(result.successes, earlier.successes, result.subsets)
    return replace(result, comparison=found, against=earlier.model, costs_against=costs)


def _dump(job: EvalJob, episodes: Sequence[Episode], rank: int) -> str:
    """Writes the episodes that this rank played, for `_write` to move. Returns why they are not saved, or nothing: a
    full disk must not cost the scores."""
    try:
        write_dump(job.logs, 0, episodes, (), Prompter(tokenizer(job.folder), job.settings.rollout).decode, rank)
    except ConfigError as error:
        return str(error)
    return ""


def _write(result: Result, job: EvalJob) -> None:
    from icrl_megatron.evaluation.views import picture  # imports matplotlib, which other ranks do not need

    with results.writing(job.out, results.EVALUATION, job.request.reads(), job.request.overwrite) as folder:
        write_atomically(folder / RESULT, [json.dumps(asdict(result), indent=1)], "the evaluation")
        picture(result, folder / PICTURE)
        with disk_errors(job.out, "the episodes, and the logs of servers and ranks"):
            if (job.logs / ROLLOUTS_FOLDER).exists():
                shutil.move(job.logs / ROLLOUTS_FOLDER, folder / ROLLOUTS_FOLDER)
            if any(job.logs.iterdir()):
                shutil.copytree(job.logs, folder / "logs")


def _stop(number: int = 0, frame: FrameType | None = None) -> None:
    """Ends this rank at once when it is asked to stop: it has nothing to save. Its servers end with it."""
    leave_outcome(STOPPED, "stopped on request")
    os._exit(0)  # the agent reports any other code as a failed rank


def main(arguments: Sequence[str]) -> int:
    """Entry point of one of several ranks that a command started."""
    signal.signal(signal.SIGUSR1, _stop)
    if Path(os.environ.get(STOP_ENV, "")).is_file():  # the signal arrived before the handler was installed
        _stop()
    run(EvalJob.load(Path(arguments[0])))
    return 0


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
