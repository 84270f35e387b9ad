"""Supervised training: the loop of `loop.py` on demonstrations with advantage 1.

The log-likelihood gradient is the policy gradient of samples with advantage 1 under their own policy, so only the
source of episodes differs from RL: conversations from files (`warm_start.data`), or the task sets' teachers.
`python -m icrl_megatron.sft SETTINGS.yaml` is one rank. It first creates the embedded model if `model.init` is set, and
writes a Hugging Face folder to `<run_dir>/hf`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist

from icrl_megatron import loop
from icrl_megatron.actor.actor import Actor
from icrl_megatron.agents.cache import ToolCache
from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.algo.headers import EpisodeHeader
from icrl_megatron.algo.samples import to_samples
from icrl_megatron.algo.schedules import learning_rate
from icrl_megatron.data.sampler import TaskSampler, order_seed
from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed.process import StopRequest, run_rank
from icrl_megatron.engines.rank import Share
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.rollout.episode import EpisodeSetup, play
from icrl_megatron.rollout.played import EpisodeSource, Played, RolloutRequest, WithoutEngine, shared
from icrl_megatron.rollout.prompts import Prompter, template_words, tokenizer
from icrl_megatron.rollout.teacher import teacher_speakers
from icrl_megatron.rollout.watchdog import WATCHDOG
from icrl_megatron.run import conversations, saving
from icrl_megatron.run.conversations import HeldoutLoss
from icrl_megatron.run.evaluator import Evaluator
from icrl_megatron.run.joining import joined
from icrl_megatron.run.parts import NoEngines, Parts
from icrl_megatron.run.problems import ProblemShare, chosen
from icrl_megatron.run.recorder import SupervisedRecorder
from icrl_megatron.run.state import RunState
from icrl_megatron.run.watch import NoWatch
from icrl_megatron.settings.algo_schema import AlgoSettings, Calibration
from icrl_megatron.settings.loading import load_saved, run_folder
from icrl_megatron.settings.schema import DebugSettings, Settings
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.base import Teachable
from icrl_megatron.utils import results
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.progress import Progress

SEED_FOLDER = "random"
"""Folder of the embedded model with its initial weights."""
PLAIN = AlgoSettings(internalise=False, calibration=Calibration(enabled=False), loss_normalisation="token_mean")
"""Log-likelihood: no effective clip, no weights, every sample under the prompt that it was played with."""


def main(settings: Settings) -> int:
    """Runs one rank of the stage; returns 0 or STOPPED."""
    stop = StopRequest()
    WATCHDOG.obey(stop)
    settings = supervised(settings)
    with joined(settings) as grid:
        return _run(settings, grid, stop)


def supervised(settings: Settings) -> Settings:
    """The same settings with a log-likelihood objective (no clip, no weights, original prompts), one demonstration per
    task, and no evaluation."""
    warm = settings.warm_start
    return replace(
        settings,
        steps=warm.steps,
        max_generated_tokens=None,
        start_from="",
        algo=replace(PLAIN, on_no_signal="error", max_resamples=0),
        rollout=replace(
            settings.rollout,
            temperature=1.0,
            rounds=2,
            # Without a step, the stage only makes the model and checks the problems for the run.
            tasks_per_step=warm.episodes_per_step if warm.wanted else settings.rollout.tasks_per_step,
            episodes_per_task=1,
            oversample=1.0,
            partial=False,
        ),
        actor=replace(settings.actor, offload="none"),
        optim=replace(settings.optim, learning_rate=warm.learning_rate, weight_decay=warm.weight_decay),
        debug=DebugSettings(),
    )


def constant_credit(episodes: Iterable[EpisodeHeader]) -> CreditReport:
    """Credit with advantage 1 for every sample of a demonstration: the policy gradient under the demonstrator's
    policy."""
    samples = [replace(s, advantage=1.0) for e in episodes for s in to_samples(e, PLAIN, train_critic=True)]
    return CreditReport(tuple(samples), groups=0, flat_groups=0, dropped_groups=0, dropped_samples=0)


@dataclass(frozen=True)
class TeacherSource(WithoutEngine):
    """Episodes that the task sets' teachers play; every rank plays all of them and gets the same ones."""

    setup: EpisodeSetup
    share: Share

    def play(self, request: RolloutRequest) -> Played:
        speakers_for = teacher_speakers(
            registry.get, self.setup.prompter, request.seeds, self.setup.settings.environment_timeout_s
        )
        playing = play(request.tasks, request.episodes, self.setup, speakers_for, request.seeds)
        played, dropped = asyncio.run(playing)
        return shared(played, self.share, dropped, generated=0)


def _run(settings: Settings, grid: grids.Grid, stop: StopRequest) -> int:
    run_dir, warm, progress = run_folder(settings), settings.warm_start, Progress(enabled=grid.rank == 0)
    start = saving.begin(run_dir, _start_folder(settings, grid), grid, progress.log)
    prompter = Prompter(tokenizer(start.tokenizer), settings.rollout)
    lessons = (_from_files if warm.data else _from_teachers)(settings, prompter, start.model, grid, progress)
    settings = replace(settings, steps=lessons.steps)
    actor = Actor(settings, start.folder, grid, weights=start.found is None)
    saver = saving.Saver(start, actor, settings.checkpoint.keep, progress.log, lambda: bool(stop))
    parts = Parts(
        settings=settings,
        grid=grid,
        actor=actor,
        sync=NoEngines(),
        source=lessons.source,
        sampler=lessons.sampler,
        credit=constant_credit,
        rate=lambda step: learning_rate(step, lessons.steps, warm),
        watch=NoWatch(),
        purpose="sft",
    )
    state = RunState(parts, saver, stop, progress.log)
    with closing(state), progress.phase("warm start", settings.steps) as bar, saver.on_error():
        bar.advance(state.step)
        evaluator = Evaluator()
        if lessons.heldout.headers:
            heldout = parts.deliver(constant_credit(lessons.heldout.headers).samples, lessons.heldout)
            evaluator = HeldoutLoss(parts, state, heldout, progress.log)
        recorder = SupervisedRecorder(state, progress, bar, prompter.decode, lessons.dropped)
        return loop.run(parts, state, recorder, evaluator)


@dataclass(frozen=True)
class Lessons:
    """What a run is trained on."""

    source: EpisodeSource
    sampler: TaskSampler
    steps: int
    dropped: int = 0
    """Problems or rows that are left out."""
    heldout: Played = field(default_factory=lambda: Played((), ()))
    """Conversations whose loss is measured."""


def _from_teachers(
    settings: Settings, prompter: Prompter, model: Path, grid: grids.Grid, progress: Progress
) -> Lessons:
    tool_cache = ToolCache.of(settings.tasks.tool_cache)
    catalogue = registry.Catalogue(settings.tasks.sources, settings.rollout.max_observation_bytes, tool_cache)
    found = chosen(settings, catalogue, prompter, model, grid, progress)
    source = TeacherSource(
        EpisodeSetup(catalogue.environment, prompter, settings.rollout), Share(grid.rank, grid.world)
    )
    sampler = TaskSampler(settings.tasks.sources, found.train, order_seed(settings))
    return Lessons(source, sampler, settings.steps, found.dropped)


def _from_files(settings: Settings, prompter: Prompter, model: Path, grid: grids.Grid, progress: Progress) -> Lessons:
    share = ProblemShare(grid.rank, grid.world, lambda mine: grids.gather_objects(grid, mine))
    found = conversations.load(settings, prompter, ModelShape.read(model).max_positions, share, progress.log)
    sampler = TaskSampler(found.sources, found.train, order_seed(settings))
    heldout = shared(found.episodes(found.heldout), found.share)
    return Lessons(found, sampler, found.steps(settings), found.dropped, heldout)


def _start_folder(settings: Settings, grid: grids.Grid) -> Path:
    """The model to start from: `model.path`, or the one that `model.init` describes."""
    if settings.model.path:
        return Path(settings.model.path)
    assert settings.model.init is not None  # checked in run/checks.py
    folder = run_folder(settings) / SEED_FOLDER
    if grid.rank == 0 and not (folder / "config.json").exists():
        from icrl_megatron.model.tiny import build_tiny

        words = _words(settings) if settings.model.init.tokenizer == "words" else set()
        with results.writing(folder, results.MODEL, remedy=results.MOVE_AWAY) as new, disk_errors(folder, "the model"):
            build_tiny(new, settings.model.init, sorted(words), settings.seed)
    dist.barrier(group=grid.host_group)
    return folder


def _words(settings: Settings) -> set[str]:
    """Every word of the tasks and templates. `run/teach_checks.py` has checked that the task sets list theirs."""
    catalogue = registry.Catalogue(settings.tasks.sources)
    task_sets = [catalogue.get(source.name) for source in settings.tasks.sources]
    words = (set(one.vocabulary()) for one in task_sets if isinstance(one, Teachable))
    return template_words(settings.rollout.templates).union(*words)


if __name__ == "__main__":
    run_rank(lambda: main(load_saved(Path(sys.argv[1]))))
