"""Whole runs of `icrl train` on the real SGLang: two grids, a kill in the middle, servers of somebody else."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from engine_cases import engine_on, engine_settings, generate, greedy, load
from whole_runs import end, icrl, rows, start, when

from icrl_megatron.rollout.engine import Sampling
from icrl_megatron.rollout.sglang_server import Server
from icrl_megatron.telemetry.dumps import dump_path, read_episodes

pytestmark = [pytest.mark.engine, pytest.mark.dist, pytest.mark.slow]

STEPS = 3
EPISODES = 16


def command(folder: Path, model: Path, *overrides: str) -> list[str]:
    return [
        "train",
        "rulebook_easy",
        f"run_dir={folder}",
        f"steps={STEPS}",
        f"model.path={model}",
        "warm_start.steps=0",
        "rollout.tasks_per_step=4",
        "rollout.episodes_per_task=4",
        "eval.problems=8",
        "eval.interval=0",
        "eval.control_problems=0",
        "algo.on_no_signal=train",
        "algo.max_resamples=0",
        "engine.kind=sglang",
        f"engine.python={os.environ['ICRL_ENGINE_PYTHON']}",
        *overrides,
    ]


def steps(folder: Path) -> list[dict[str, float]]:
    return [row for row in rows(folder) if "engine/requests" in row]


def test_three_steps_at_tensor_parallel_2(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tp2"
    grid = ("launch.ranks=2", "actor.tensor_parallel=2", "engine.servers=1")
    code, _, err = icrl(*command(folder, model, *grid))
    assert code == 0, err
    done = steps(folder)
    assert [row["episodes/played"] for row in done] == [EPISODES] * STEPS
    assert [row["weights/version"] for row in done] == [2, 3, 4]
    assert all(row["actor/mismatch_max"] < 1e-4 for row in done), [row["actor/mismatch_max"] for row in done]
    assert all(row["engine/deaths"] == 0 for row in done)
    assert all(0 < row["engine/cache_hit_rate"] < 1 for row in done)


def test_a_run_at_pipeline_parallel_2_survives_kill_9_of_its_server(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pp2"
    log = folder / "logs" / "sglang_0.log"
    grid = ("launch.ranks=2", "actor.pipeline_parallel=2", "engine.servers=1")
    running = start(*command(folder, model, *grid))
    when(running, lambda: log.exists() and log.read_text().count("Prefill batch") >= 8)
    servers = [p for p in psutil.Process(running.pid).children(recursive=True) if "sglang.launch_server" in p.cmdline()]
    os.kill(min(servers, key=lambda p: p.create_time()).pid, signal.SIGKILL)
    code, _, err = end(running)
    assert code == 0, err
    done = steps(folder)
    assert [row["episodes/played"] for row in done] == [EPISODES] * STEPS
    assert all(row["episodes/dropped"] == 0 for row in done)
    assert all(row["actor/mismatch_max"] < 1e-4 for row in done)
    assert log.read_text().count("=== ") == 2, "the server was started twice"


def test_servers_of_somebody_else_are_synced_over_a_group(server: Server, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    code, _, err = icrl(*command(folder, model, f"engine.urls=[{server.url}]", "steps=1"))
    assert code == 0, err
    assert steps(folder)[0]["actor/mismatch_max"] < 1e-4
    assert server.alive()

    # What the run trained and pushed last is what it exported: the engine says what transformers says of that.
    engine, trained = engine_on(server, model, engine_settings()), load(folder / "hf")
    prompts = [[8, 9, 10 + i] for i in range(6)]
    said = generate(engine, [(p, Sampling(0.0, 16, 0, ())) for p in prompts])
    assert [c.ids for c in said] == [greedy(trained, p, 16, trained.config.eos_token_id) for p in prompts]


def test_oversampled_steps_cut_off_the_slow_and_go_on_with_them(server: Server, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "oversampled"
    partial = ("rollout.oversample=2", "rollout.partial=true", "algo.mismatch_correction.enabled=true")
    code, _, err = icrl(*command(folder, model, f"engine.urls=[{server.url}]", *partial))
    assert code == 0, err
    done = steps(folder)
    assert all(row["episodes/played"] >= EPISODES for row in done)
    assert sum(row["episodes/cut_off"] for row in done) > 0
    assert all(row["episodes/dropped"] == 0 for row in done)
    # Step n samples with version n: what was kept from the step before has older tokens, and says so.
    replies = [
        (step, turn.completion)
        for step in range(1, STEPS + 1)
        for episode in read_episodes(dump_path(folder, step))
        for attempt in episode.attempts
        for turn in attempt.turns
    ]
    assert all(c.weight_version <= step for step, c in replies)
    assert any(c.weight_version < step or c.older for step, c in replies), "nothing of an earlier step went on"
    assert all(version < c.weight_version for _, c in replies for version, _ in c.older)
