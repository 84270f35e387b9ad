"""`icrl distill --heldout`: a multi-agent system on held-out problems, as a result for `icrl eval --against`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from icrl_megatron.distill import command
from icrl_megatron.distill.command import Distillation
from icrl_megatron.distill.events import Run
from icrl_megatron.distill.timing import busy_seconds
from icrl_megatron.evaluation.result import Result
from icrl_megatron.evaluation.scores import ALL, Score, Successes, estimate, transitions
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks.datasets import content_hash, subset_of
from icrl_megatron.utils.errors import ConfigError, HopelessError
from icrl_megatron.utils.files import write_atomically
from icrl_megatron.utils.result_files import begins_with, check_file


def measure(settings: Settings, out: Path, overwrite: bool = False) -> str:
    """Plays the first `eval.problems` held-out problems of each source, `distill.attempts` times each, and writes the
    result beside `out`. Returns a summary. Raises as `icrl_megatron.distill.command.run` does."""
    path, rounds = out.with_suffix(".eval.json"), settings.rollout.rounds
    if settings.distill.system == "model" and rounds > 1:
        raise ConfigError(
            f"rollout.rounds={rounds} with --heldout and distill.system=model: the grader decides which attempts are "
            "tried again, so the result cannot be compared; use `icrl eval` with --rounds"
        )
    check_file(path, "an evaluation", begins_with(b'"model"', b'"samples"'), overwrite)

    def conclude(job: Distillation, runs: Sequence[Run]) -> str:
        if not runs:
            raise HopelessError(f"no attempt of {len(job.failures)} finished, the last one: {job.failures[-1].message}")
        result = _result(job, runs)
        write_atomically(path, [json.dumps(asdict(result), indent=1)], "the evaluation")
        (score,) = result.scores
        tokens = f"{score.attempt_tokens:.0f} tokens written and {score.read_tokens:.0f} read per attempt"
        return (
            f"{100 * score.average.mean:.1f} % right, {tokens}; {score.dropped} attempts failed, and the same command "
            f"tries them again\nwritten to {path}: compare with icrl eval MODEL --against {path}"
        )

    return command.played(settings, out, conclude, overwrite, "heldout")


def _result(job: Distillation, runs: Sequence[Run]) -> Result:
    samples, lost = job.settings.distill.attempts, [one for one in job.failures if one.unanswered is None]
    found: Successes = {run.task_id: [[] for _ in range(samples)] for run in runs}
    for run in runs:
        found[run.task_id][run.attempt] = [run.correct]
    tasks = [task for task in job.problems if task.task_id in found]
    return Result(
        model=f"the system ({job.settings.distill.system})",
        critic="itself",
        rounds=1,
        samples=samples,
        scores=(_score(runs, found, len(lost)),),
        generated_tokens=sum(run.total().written for run in runs),
        successes=found,
        subsets={task.task_id: subset_of(task) for task in tasks},
        contents={task.task_id: content_hash(task.problem) for task in tasks},
        lost=tuple(dict.fromkeys(failed.message for failed in lost))[:3],
        seconds=busy_seconds(run.timing for run in runs),
    )


def _score(runs: Sequence[Run], found: Successes, failed: int) -> Score:
    """The score of all problems together. A prompt that is sent again counts again."""
    tries = [[one[0] for one in of if one] for of in found.values()]
    calls = Counter(event.call.name for run in runs for event in run.events if event.call is not None)
    return Score(
        subset=ALL,
        average=estimate([float(np.mean(of)) for of in tries]),
        passed=estimate([float(any(of)) for of in tries]),
        rounds=(estimate([float(np.mean(of)) for of in tries]),),
        transitions=transitions([]),
        attempt_tokens=sum(run.total().written for run in runs) / len(runs),
        read_tokens=sum(run.total().read for run in runs) / len(runs),
        measures={
            "answered": sum(any(event.kind == "answer" for event in run.events) for run in runs) / len(runs),
            "calls": calls.total() / len(runs),
            **{f"calls_{name}": count / len(runs) for name, count in sorted(calls.items())},
            **_waits(runs),
        },
        critique_tokens=0.0,
        dropped=failed,
    )


def _waits(runs: Sequence[Run]) -> dict[str, float]:
    """Mean seconds of an attempt, and of each agent's waits for replies; empty if a run's time is unknown."""
    known = [run.timing for run in runs if run.timing is not None]
    if len(known) < len(runs):
        return {}
    agents = sorted({agent for timing in known for agent in timing.agents})
    waits = {f"seconds_{name}": sum(t.agents.get(name, 0.0) for t in known) / len(known) for name in agents}
    return {"seconds": sum(timing.seconds for timing in known) / len(known), **waits}
