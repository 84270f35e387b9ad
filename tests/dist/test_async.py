"""Asynchronous runs (`rollout.staleness`): real ranks, rollout processes and faults."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest
from engines_out_of_step import LAST
from whole_runs import end, from_model, icrl, kill_tree, lines, rows, start, train, when

from icrl_megatron.data.sampler import TaskSampler, order_seed
from icrl_megatron.rollout.probe import PROBE_TOKENS
from icrl_megatron.settings.loading import SAVED_NAME, load_saved
from icrl_megatron.tasks import registry
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.telemetry.writer import MetricsRow

pytestmark = pytest.mark.dist

ASYNC = ("rollout.staleness=2", "algo.mismatch_correction.enabled=true", "telemetry.dump=all", "eval.problems=4")
PER_STEP = 4


def trained(folder: Path) -> list[MetricsRow]:
    return [row for row in rows(folder) if "tokens/generated" in row]


def check(folder: Path, steps: int, unmeasured: int = 0) -> None:
    """Every step is there once and trained on groups of the run's order, each at most once; the engine's log-probs are
    the trainer's wherever they are comparable, in all steps but `unmeasured`."""
    found = trained(folder)
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    settings = load_saved(folder / SAVED_NAME)
    problems = {one.name: registry.get(one.name).problems("train") for one in settings.tasks.sources}
    sampler = TaskSampler(settings.tasks.sources, problems, order_seed(settings))
    dropped = int(sum(row["staleness/dropped_groups"] for row in found))
    order = [task.task_id for step in range(steps + dropped) for task in sampler.draw(step, 0, PER_STEP)]
    dumps = Rollouts(folder)
    played = [sorted({e.task.task_id for e in dumps.episodes(step)}) for step in dumps.steps]
    assert [len(tasks) for tasks in played] == [PER_STEP] * steps
    assert max(Counter(task for tasks in played for task in tasks).values()) == 1, "no group is trained on twice"
    begun = order[: steps * PER_STEP + dropped]
    assert {task for tasks in played for task in tasks} <= set(begun)
    for row in found:
        assert 0 <= row["staleness/mean"] <= row["staleness/max"] <= 2
        assert row.get("actor/mismatch_max", 0.0) < 1e-4
    assert sum("actor/mismatch_abs" not in row for row in found) <= unmeasured
    assert any(row["staleness/max"] > 0 and row["actor/drift_abs"] > 0 for row in found)


def test_two_ranks_train_on_groups_of_the_last_versions(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = train(folder, *from_model(finished_run), *ASYNC, "launch.ranks=2", "steps=7", "eval.control_problems=2")
    code, _, err = icrl(*command)
    assert code == 0, err
    check(folder, 7)
    for moment in ("before", "after"):
        (control,) = json.loads((folder / f"control_{moment}.json").read_text()).values()
        assert control["first_attempts"] == 4 and control["failures"] == control["critique"]["n"]
    kept = 0.0
    dumps = Rollouts(folder)
    for step, row in zip(dumps.steps, trained(folder), strict=True):
        used = sum(episode.generated_tokens() for episode in dumps.episodes(step))
        assert kept + row["tokens/generated"] == used + row["tokens/discarded"] + row["tokens/kept"]
        kept = row["tokens/kept"]


def test_faults_neither_lose_nor_repeat_a_group(finished_run: Path, tmp_path: Path) -> None:
    """The rollout process is killed, then everything, then the run is asked to stop, and then it ends."""
    folder = tmp_path / "run"
    command = train(folder, *from_model(finished_run), *ASYNC, "steps=10", "checkpoint.interval=1")
    running = start(*command)
    try:
        when(running, lambda: lines(folder) >= 2)
        (rollouts,) = [p for p in psutil.Process(running.pid).children(recursive=True) if _plays(p)]
        os.kill(rollouts.pid, signal.SIGKILL)
        when(running, lambda: any(row.get("staleness/lost_engines", 0) for row in rows(folder)))
        when(running, lambda: trained(folder)[-1]["step"] >= 5)
    finally:
        kill_tree(running)
    running = start(*command)
    when(running, lambda: trained(folder)[-1]["step"] >= 7)
    running.send_signal(signal.SIGTERM)
    code, _, err = end(running)
    assert code == 3, err
    code, _, err = icrl(*command)
    assert code == 0, err
    check(folder, 10, unmeasured=3)  # a new process has no prompt for a probe until a group has ended


def test_an_engine_without_the_newest_weights_ends_a_run_in_which_no_loss_token_is_of_these(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    folder = tmp_path / "run"
    grid = ("launch.ranks=4", "actor.tensor_parallel=2", "actor.pipeline_parallel=2")
    slow = ("rollout.staleness=4", "steps=12", "eval.interval=0", "engine.mismatch_limit.patience=2")
    code, out, err = icrl(
        *train(folder, *from_model(finished_run), *ASYNC, *grid, *slow, "engine.kind=engines_out_of_step:KIND")
    )
    said = " ".join((out + err).split())
    assert code != 0 and f"at step {LAST + 2}, 2 in a row. Probable causes: weights were not synced" in said, err
    found = trained(folder)
    assert [row["step"] for row in found] == list(range(1, LAST + 2))
    *healthy, wrong = found
    assert all(row["actor/mismatch_abs"] < 1e-5 and row["actor/mismatch_max"] < 1e-4 for row in healthy)
    assert wrong["actor/stale"] == 1.0 and 0 < wrong["actor/mismatched"] <= PROBE_TOKENS
    assert wrong["actor/mismatch_abs"] > 1e-5


def test_engines_that_sleep_while_the_actor_trains(finished_run: Path, tmp_path: Path) -> None:
    """Their unfinished episodes continue in later steps; a killed process is replaced by one that sleeps as well."""
    folder = tmp_path / "run"
    command = train(folder, *from_model(finished_run), *ASYNC, "rollout.interleave=true", "launch.ranks=2", "steps=7")
    running = start(*command)
    try:
        when(running, lambda: lines(folder) >= 2)
        os.kill(next(p for p in psutil.Process(running.pid).children(recursive=True) if _plays(p)).pid, signal.SIGKILL)
        code, _, err = end(running)
    finally:
        kill_tree(running)
    assert code == 0, err
    check(folder, 7, unmeasured=1)
    assert sum(row["staleness/lost_engines"] for row in trained(folder)) == 1


def _plays(process: psutil.Process) -> bool:
    return any("rollout_process" in word for word in process.cmdline())
