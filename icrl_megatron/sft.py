"""The supervised stage: demonstrations in the three prompt forms, through the same episodes, packing and actor.

Supervised learning is the policy gradient of samples with advantage 1 under their own policy: nothing else is needed.
`python -m icrl_megatron.sft SETTINGS.yaml` is one rank of it. It makes the embedded model first where
`model.init` asks for one, and leaves a Hugging Face folder at `<run_dir>/hf`.
"""

from __future__ import annotations

import asyncio
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from icrl_megatron.actor import checkpoint
from icrl_megatron.algo.samples import to_samples
from icrl_megatron.data.packing import pack
from icrl_megatron.data.sampler import TaskSampler, order_seed
from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed.platform import token_multiple
from icrl_megatron.distributed.process import STOPPED, StopRequest, run_rank
from icrl_megatron.rollout.episode import Stage, play
from icrl_megatron.rollout.prompts import Prompter, template_words, tokenizer
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.rollout.teacher import teacher_casting
from icrl_megatron.rollout.watchdog import WATCHDOG
from icrl_megatron.run import saving
from icrl_megatron.run.files import EXPORT
from icrl_megatron.run.joining import joined
from icrl_megatron.run.parts import NEWEST_ROWS
from icrl_megatron.settings.loading import load_saved, run_folder
from icrl_megatron.settings.schema import AlgoSettings, Calibration, Settings, WarmStart
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Teachable
from icrl_megatron.telemetry.writer import MetricsWriter, read_rows
from icrl_megatron.train import chosen
from icrl_megatron.types import Sample, StepStats, Task
from icrl_megatron.utils import results
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.progress import Progress

SEED_FOLDER = "random"
"""Where the embedded model stands before it learned anything."""


def main(settings: Settings) -> int:
    """One rank of the stage; returns 0 or STOPPED."""
    stop = StopRequest()
    WATCHDOG.obey(stop)
    settings = supervised(settings)
    with joined(settings) as grid:
        return _run(settings, grid, stop)


def supervised(settings: Settings) -> Settings:
    """The same run with an objective that is plain log-likelihood: no clip, no weight, every prompt as it was."""
    warm = settings.warm_start
    algo = AlgoSettings(internalise=False, calibration=Calibration(enabled=False), loss_normalisation="token_mean")
    return replace(
        settings,
        algo=algo,
        rollout=replace(settings.rollout, temperature=1.0, rounds=2),
        optim=replace(settings.optim, learning_rate=warm.learning_rate, weight_decay=warm.weight_decay),
    )


def learning_rate(step: int, warm: WarmStart) -> float:
    """Linear warm-up; with `decay`, linear to a tenth over the last half."""
    rate = warm.learning_rate * min(1.0, (step + 1) / (warm.warmup_steps + 1))
    late = max(0.0, 2.0 * step / warm.steps - 1.0)
    return rate * (1.0 - 0.9 * late) if warm.decay else rate


def demonstrations(tasks: list[Task], stage: Stage, seeds: Seeds) -> list[Sample]:
    """What the teachers do and say on these tasks, as samples of advantage 1. The same on every rank. Raises
    HopelessError when all of them failed."""
    casting = teacher_casting(registry.get, stage.prompter, seeds, stage.settings.environment_timeout_s)
    episodes, dropped = asyncio.run(play(tasks, 1, stage, casting, seeds))
    if not episodes:
        lost = dropped[0]
        raise HopelessError(f"warm start: all {len(dropped)} demonstrations failed; {lost.task.task_id}: {lost.error}")
    form = AlgoSettings(internalise=False, calibration=Calibration(enabled=False))
    return [replace(s, advantage=1.0) for e in episodes for s in to_samples(e, form, train_critic=True)]


def _run(settings: Settings, grid: grids.Grid, stop: StopRequest) -> int:
    from icrl_megatron.actor.actor import Actor
    from icrl_megatron.actor.export import write_hf
    from icrl_megatron.model.weights import Gatherer

    run_dir, warm, progress = run_folder(settings), settings.warm_start, Progress(enabled=grid.rank == 0)
    start = saving.begin(run_dir, _start_folder(settings, grid), grid, progress.log)
    prompter = Prompter(tokenizer(start.tokenizer), settings.rollout)
    catalogue = registry.Catalogue(settings.tasks.sources, settings.rollout.max_observation_bytes)
    problems = chosen(settings, catalogue, prompter, start.model, grid, progress)
    actor = Actor(settings, start.folder, grid, weights=start.found is None)
    saver = saving.Saver(start, actor, settings.checkpoint.keep, progress.log, lambda: bool(stop))
    stage = Stage(catalogue.environment, prompter, settings.rollout)
    sampler = TaskSampler(settings.tasks.sources, problems.train, order_seed(settings))
    resumed = saver.restore()
    done, main = 0 if resumed is None else resumed.step, grid.rank == 0
    written = None if resumed is None else done
    newest = read_rows(saver.folder / NEWEST_ROWS) if resumed is not None else []
    writer = grids.together(grid, lambda: MetricsWriter(run_dir, written, newest) if main else None)
    align = token_multiple(settings.actor)

    def beside() -> saving.Files:
        return {NEWEST_ROWS: grids.together(grid, lambda: writer.saved() if writer is not None else []) or []}

    with progress.phase("warm start", warm.steps) as bar, saver.on_error():
        bar.advance(done)
        for step in range(done, warm.steps):
            tasks = sampler.draw(step, 0, warm.episodes_per_step)
            samples = demonstrations(tasks, stage, Seeds(settings.seed, step, "sft"))
            plan = pack(
                samples,
                settings.algo,
                micro_batch_tokens=settings.actor.micro_batch_tokens,
                align=align,
                replica=grid.data_rank,
                replicas=grid.data,
            )
            stats = actor.train(plan, actor.score(plan), learning_rate(step, warm))
            nll = stats.metrics.get("nll", math.nan)  # an update that was skipped measured none
            bar.advance(1, note=f"nll {nll:.3f}")
            _write(writer, grid, step + 1, nll, stats)
            saver.completed(checkpoint.Progress(step + 1, 0, actor.optimizer.steps, 0), beside)
            if grids.any_rank(grid, bool(stop)):
                saver.save()
                return STOPPED
            if (step + 1) % settings.checkpoint.interval == 0:
                saver.save()
        write_hf(Gatherer(actor.rows, grid), start.model, run_dir / EXPORT, grid, remedy=results.MOVE_AWAY)
    return 0


def _write(writer: MetricsWriter | None, grid: grids.Grid, step: int, nll: float, stats: StepStats) -> None:
    skipped = float(stats.skipped_updates)
    row = {"sft/nll": nll, "actor/grad_norm": stats.grad_norm, "actor/skipped_updates": skipped}
    grids.together(grid, lambda: writer.write(step, row) if writer is not None else None)


def _start_folder(settings: Settings, grid: grids.Grid) -> Path:
    """The model to start from: `model.path`, or `model.init` made with every word of the tasks and templates."""
    if settings.model.path:
        return Path(settings.model.path)
    if settings.model.init is None:
        raise ConfigError("model.path is empty and model.init is not set: name a Hugging Face folder, or init a model")
    folder = run_folder(settings) / SEED_FOLDER
    if grid.rank == 0 and not (folder / "config.json").exists():
        from icrl_megatron.model.tiny import build_tiny

        words = template_words(settings.rollout.templates)
        for source in settings.tasks.sources:
            task_set = registry.get(source.name)
            if not isinstance(task_set, Teachable):
                raise ConfigError(
                    f"task set {source.name!r} has no vocabulary, so a model that model.init makes cannot play it; "
                    "take it out of tasks.sources, or begin a new run with model.path"
                )
            words |= set(task_set.vocabulary())
        with results.writing(folder, results.MODEL, remedy=results.MOVE_AWAY) as new, disk_errors(folder, "the model"):
            build_tiny(new, settings.model.init, sorted(words), settings.seed)
    dist.barrier(group=grid.host_group)
    return folder


if __name__ == "__main__":
    run_rank(lambda: main(load_saved(Path(sys.argv[1]))))
