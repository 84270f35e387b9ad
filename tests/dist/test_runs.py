"""Interrupted runs: after any interruption, the same command gives the results of an uninterrupted run."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from whole_runs import WARM_START, from_model, has_child, icrl, kill_tree, lines, rows, signalled, start, train, when

from icrl_megatron.distributed.process import STOPPED
from icrl_megatron.telemetry.dump_shards import shard_path
from icrl_megatron.telemetry.dump_writer import chosen
from icrl_megatron.telemetry.dumps import Rollouts

pytestmark = [pytest.mark.dist, pytest.mark.slow]

WEIGHTS = "model.safetensors"
DUMPED = 6
"""Episodes of a step that the resumed run dumps: one group and half of another."""


def test_run_killed_three_times_ends_bit_identical(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    warm, command = folder / "warm_start", train(folder, *WARM_START)

    in_warm_start = start(*command)
    when(in_warm_start, lambda: lines(warm) >= 5)
    kill_tree(in_warm_start)
    assert not (warm / "hf").exists()

    at_a_checkpoint = start(*command)
    when(at_a_checkpoint, lambda: any((folder / "checkpoints").glob("step_000002*")))
    kill_tree(at_a_checkpoint)

    within_a_step = start(*command)
    before = lines(folder)
    when(within_a_step, lambda: lines(folder) > max(before, 4))
    kill_tree(within_a_step)
    assert not (folder / "hf").exists()

    code, _, err = icrl(*command)
    assert code == 0, err
    assert rows(warm) == rows(finished_run / "warm_start")
    assert rows(folder) == rows(finished_run)
    for exported in ("warm_start/hf", "hf"):
        assert (folder / exported / WEIGHTS).read_bytes() == (finished_run / exported / WEIGHTS).read_bytes()
    assert [p.name for p in (folder / "checkpoints").iterdir()].count("step_000006") == 1


def test_finished_run_is_not_repeated(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    code, out, err = icrl(*train(folder, *WARM_START))
    assert code == 0, err
    assert rows(folder) == rows(finished_run)
    assert (folder / "hf" / WEIGHTS).read_bytes() == (finished_run / "hf" / WEIGHTS).read_bytes()
    assert "Held-out success" in out


def test_signals_stop_with_a_checkpoint_and_the_run_resumes(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    command = train(folder, *from_model(finished_run))
    done = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        running = start(*command)
        when(running, lambda: has_child(running))  # noqa: B023 (called at once)
        code, _, err = signalled(running, number)
        assert code == STOPPED, err
        assert "stopped on request" in err
        done.append(int(rows(folder)[-1]["step"]))
        assert (folder / "checkpoints" / f"step_{done[-1]:06d}" / "icrl.json").exists()
    assert done == [1, 2]

    code, _, err = icrl(*command)
    assert code == 0, err
    assert rows(folder) == rows(finished_run)


def test_signals_in_the_warm_start_stop_with_a_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    warm, command = folder / "warm_start", train(folder, *WARM_START)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before = lines(warm)
        running = start(*command)
        when(running, lambda: lines(warm) > before + 1)  # noqa: B023 (called at once)
        code, _, err = signalled(running, number)
        assert code == STOPPED, err
        done = int(rows(warm)[-1]["step"])
        assert (warm / "checkpoints" / f"step_{done:06d}" / "icrl.json").exists()
        assert not (warm / "hf").exists()

    code, _, err = icrl("sft", *command[1:])
    assert code == 0, err
    assert rows(warm) == rows(finished_run / "warm_start")
    assert (warm / "hf" / WEIGHTS).read_bytes() == (finished_run / "warm_start" / "hf" / WEIGHTS).read_bytes()


def test_killed_run_at_tensor_parallel_2_ends_bit_identical(finished_run: Path, tmp_path: Path) -> None:
    def at_two(folder: Path) -> list[str]:
        return train(folder, *from_model(finished_run), "launch.ranks=2", "actor.tensor_parallel=2", "steps=4")

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = icrl(*at_two(whole))
    assert code == 0, err
    first = start(*at_two(killed))
    when(first, lambda: lines(killed) > 3)
    kill_tree(first)
    assert not (killed / "hf").exists()
    code, _, err = icrl(*at_two(killed))
    assert code == 0, err
    assert rows(killed) == rows(whole)
    assert (killed / "hf" / WEIGHTS).read_bytes() == (whole / "hf" / WEIGHTS).read_bytes()


def test_second_job_in_a_run_folder_is_rejected(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    command = train(folder, *from_model(finished_run), "steps=5000", "eval.interval=0", "checkpoint.interval=1000")
    first = start(*command)
    when(first, lambda: lines(folder) > 1)
    saved = (folder / "settings.yaml").read_text()
    code, _, err = icrl(*command, "steps=6000")
    assert code == 2
    assert (folder / "settings.yaml").read_text() == saved
    assert err.endswith(f"error: run_dir={folder}: another run writes there; wait for it, or choose another name\n")
    code, _, err = signalled(first, signal.SIGTERM)
    assert code == STOPPED, err


def test_run_starts_from_a_checkpoint_of_another_grid(finished_run: Path, tmp_path: Path) -> None:
    folder, grid = tmp_path / "tp2", ["launch.ranks=2", "actor.tensor_parallel=2"]
    given = [f"start_from={finished_run}", "start_with_moments=true", "steps=0", "eval.problems=2"]
    code, _, err = icrl(*train(folder, *given, *grid))
    assert code == 0, err
    assert not (folder / "warm_start").exists()
    for exported in ("start/hf", "hf"):
        assert (folder / exported / WEIGHTS).read_bytes() == (finished_run / "hf" / WEIGHTS).read_bytes()
    assert [row["step"] for row in rows(folder)] == [0]


def test_run_resumes_on_another_grid(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tp2"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000006")
    grid = ("launch.ranks=2", "actor.tensor_parallel=2")
    code, _, err = icrl(*train(folder, *WARM_START, *grid, f"telemetry.dump={DUMPED}"))
    assert code == 0, err
    there, here = rows(finished_run), rows(folder)
    assert [row["step"] for row in here] == [row["step"] for row in there]
    assert here[:5] == there[:5]
    next_step = next(i for i, row in enumerate(here) if row["step"] == 5)
    # Engines have other batches, so sums are rounded differently, but tokens and rewards must not change.
    assert here[next_step] == pytest.approx(there[next_step], rel=1e-3, abs=1e-5)
    assert here[next_step]["tokens/generated"] == there[next_step]["tokens/generated"]
    # Each rank dumps its part of the episodes that one rank would dump, and no step is there twice.
    before, after = Rollouts(finished_run), Rollouts(folder)
    assert after.steps == before.steps == [1, 2, 3, 4, 5, 6]
    assert after.read(4) == before.read(4)
    for step in (5, 6):
        everyone, dumped = ([(e.task.task_id, e.index) for e in of.episodes(step)] for of in (before, after))
        assert len(dumped) == DUMPED < len(everyone)
        assert set(dumped) == chosen(everyone, DUMPED, 0, step)
    assert all(b'"step": 5,' in shard_path(folder, rank).read_bytes() for rank in (0, 1))
