"""ICRL's training loop, on one screen. `train.py` builds the parts; everything here is the algorithm."""

from __future__ import annotations

import math

from icrl_megatron.algo.credit import CreditReport, credit
from icrl_megatron.data.packing import pack
from icrl_megatron.distributed.platform import token_multiple
from icrl_megatron.distributed.process import STOPPED
from icrl_megatron.rollout.source import Played
from icrl_megatron.run.parts import Parts, Recorder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.types import StepStats
from icrl_megatron.utils.errors import HopelessError


class NoSignalError(HopelessError):
    """Every group of a batch, and of its replacements, was flat: there is nothing to learn from."""


def run(parts: Parts, recorder: Recorder) -> int:
    """Trains to the end. Returns 0, or STOPPED when a signal asked all ranks to stop; both leave a checkpoint."""
    settings = parts.settings
    recorder.begin()
    while not recorder.finished():
        played, report = play_and_credit(parts, recorder)
        if trouble := nothing_to_learn(settings, recorder.step, played, report):
            if recorder.stop_requested():
                break  # what preempts a job ends its environment servers too: the step is played again
            raise NoSignalError(trouble + parts.watch.hint(recorder.step + 1, played.episodes))
        idle = settings.debug.mode == "rollout_only" or (not report.has_signal and settings.algo.on_no_signal == "skip")
        stats = None if idle else update(parts, recorder, report)
        parts.watch.policy(recorder.step + 1, played.episodes, stats)
        recorder.record(played, report, stats)
        if recorder.stop_requested():
            break
    else:
        recorder.conclude()
        return 0
    recorder.checkpoint()
    return STOPPED


def play_and_credit(parts: Parts, recorder: Recorder) -> tuple[Played, CreditReport]:
    """Episodes, and what each of their tokens earned. A batch without a signal is drawn again, boundedly."""
    rollout, algo = parts.settings.rollout, parts.settings.algo
    begun, needed = math.ceil(rollout.tasks_per_step * rollout.oversample), rollout.tasks_per_step
    for resample in range(algo.max_resamples + 1):
        seeds = parts.seeds(recorder.step, resample)
        tasks = parts.sampler.draw(recorder.step, resample, begun)
        with recorder.phase("rollout"):
            played = parts.source.play(tasks, rollout.episodes_per_task, seeds, rollout.rounds, needed)
        recorder.count(played, resample)
        report = credit(played.episodes, algo, train_critic=rollout.critic == "self")
        if report.has_signal:
            break
    return played, report


def nothing_to_learn(settings: Settings, step: int, played: Played, report: CreditReport) -> str:
    """Why the run cannot go on with this batch; empty where it can."""
    if not played.episodes:
        lost = played.dropped[0]
        return f"step {step}: all {len(played.dropped)} episodes were lost; {lost.task.task_id}: {lost.error}"
    if report.has_signal or (settings.algo.on_no_signal != "error" and report.samples):
        return ""
    tasks = dict.fromkeys(episode.task.task_id for episode in played.episodes)
    return (
        f"step {step}: no reward differed inside any group in {settings.algo.max_resamples + 1} batches, the last of "
        f"{', '.join(tasks)}; make them easier or harder, raise rollout.episodes_per_task, or set "
        "algo.on_no_signal=skip"
    )


def update(parts: Parts, recorder: Recorder, report: CreditReport) -> StepStats:
    """Packs the samples, scores what must be frozen, trains, and hands the new weights to the engines."""
    settings, grid = parts.settings, parts.grid
    layout = {
        "micro_batch_tokens": settings.actor.micro_batch_tokens,
        "align": token_multiple(settings.actor),
        "replica": grid.data_rank,
        "replicas": grid.data,
    }
    recompute = settings.algo.calibration.enabled and settings.algo.calibration.denominator == "recomputed"
    with recorder.phase("sleep"):
        parts.sync.sleep()
        parts.actor.offload.restore()
    with recorder.phase("pack"):
        plan = pack(report.samples, settings.algo, prompt="train", **layout)
        behaviour = pack(report.samples, settings.algo, prompt="behaviour", **layout) if recompute else None
    with recorder.phase("score"):
        scored = parts.actor.score(plan, behaviour)
    with recorder.phase("train"):
        stats = parts.actor.train(plan, scored, parts.learning_rate(recorder.step))
    parts.watch.engine(recorder.step + 1, stats)
    with recorder.phase("sync"):
        parts.actor.offload.release()
        parts.sync.push()
    return stats
