"""The training loop. `train.py` and `sft.py` build the components; the algorithm is here."""

from __future__ import annotations

import math

from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.distributed.process import STOPPED
from icrl_megatron.rollout.played import Played, RolloutRequest
from icrl_megatron.run.evaluator import Evaluator
from icrl_megatron.run.parts import Parts
from icrl_megatron.run.recorder import Recorder
from icrl_megatron.run.state import RunState
from icrl_megatron.run.watch import NoSignalError, nothing_to_learn
from icrl_megatron.telemetry.writer import MetricsRow
from icrl_megatron.types import StepStats


def run(parts: Parts, state: RunState, recorder: Recorder, evaluator: Evaluator) -> int:
    """Trains to the end. Returns 0, or STOPPED if a signal asked all ranks to stop; both leave a checkpoint."""
    settings = parts.settings
    push(parts)
    if state.step == 0:
        evaluator.control("before")
        evaluator.alone()
    if state.pending is not None:
        end_step(state, recorder, evaluator, state.pending, None)
    while not state.finished():
        played, report = play_and_credit(parts, state, recorder)
        if trouble := nothing_to_learn(settings, state.step, played, report):
            if state.stop_requested():
                break  # preemption also kills environment servers: the step is played again after a resume
            raise NoSignalError(trouble + parts.watch.hint(state.step + 1, played.headers))
        idle = settings.debug.mode == "rollout_only" or (not report.has_signal and settings.algo.on_no_signal == "skip")
        stats = None if idle else update(parts, state, recorder, played, report)
        parts.watch.policy(state.step + 1, played.headers, stats)
        state.step += 1
        end_step(state, recorder, evaluator, recorder.row(played, report, stats), stats)
        if state.stop_requested():
            break
    else:
        evaluator.alone()
        with recorder.progress.phase("export"):
            state.conclude()
        evaluator.control("after")
        return 0
    state.save()
    return STOPPED


def push(parts: Parts) -> None:
    """Sends the actor's weights to the engines, which wake up in the memory that the actor releases."""
    parts.actor.offload.release()
    parts.sync.push()


def play_and_credit(parts: Parts, state: RunState, recorder: Recorder) -> tuple[Played, CreditReport]:
    """Plays episodes and computes the credit of their tokens. A batch without a signal is drawn again, up to a limit;
    with dynamic sampling, so are tasks without one."""
    rollout, algo = parts.settings.rollout, parts.settings.algo
    begun, needed = math.ceil(rollout.tasks_per_step * rollout.oversample), rollout.tasks_per_step
    enough, kept = needed if algo.dynamic_sampling else 1, Played((), (), generated=0)
    turns = rollout.turns_at(state.step)
    for resample in range(algo.max_resamples + 1):
        seeds = parts.seeds(state.step, resample)
        tasks = parts.sampler.draw(state.step, resample, begun)
        request = RolloutRequest(tasks, rollout.episodes_per_task, seeds, rollout.rounds, needed, turns)
        with recorder.phase("rollout"):
            played = parts.source.play(request)
        recorder.count(played, resample)
        if algo.dynamic_sampling:
            played = kept = kept.and_more(played)
        report = parts.credit(played.headers)
        if algo.dynamic_sampling:
            report = report.first_with_signal(needed, (e.task for e in played.headers))
        if len(report.tasks_with_signal()) >= enough:
            break
    return played, report


def update(parts: Parts, state: RunState, recorder: Recorder, played: Played, report: CreditReport) -> StepStats:
    """Moves and packs the samples, scores them with frozen weights, trains, and sends the weights to the engines."""
    calibration = parts.settings.algo.calibration
    recompute = calibration.enabled and calibration.denominator == "recomputed"
    with recorder.phase("sleep"):
        parts.sync.sleep()
        parts.actor.offload.restore()
    with recorder.phase("pack"):
        delivered = parts.deliver(report.samples, played, len(report.counted))
        plan = delivered.plan("train")
        behaviour = delivered.plan("behaviour") if recompute else None
    with recorder.phase("score"):
        scored = parts.actor.score(plan, behaviour)
    probed = parts.probe(recorder.phase)
    with recorder.phase("train"):
        stats = parts.send_back(delivered, parts.actor.train(plan, scored, parts.rate(state.step), probed))
    parts.watch.engine(state.step + 1, stats)
    with recorder.phase("sync"):
        push(parts)
    return stats


def end_step(
    state: RunState, recorder: Recorder, evaluator: Evaluator, row: MetricsRow, stats: StepStats | None
) -> None:
    """Evaluates and saves if due, and writes the metrics. The step is already completed: an error here saves it."""
    state.completed(row)
    if evaluator.due():
        with recorder.phase("evaluation"):
            row = row | evaluator.heldout()
    row = row | recorder.timings(row, stats)
    state.write(row, recorder.table)
    state.completed(None)
    recorder.advance(row)
    state.save_if_due()
