"""Whole runs of `icrl train` on the real SGLang: two grids, a kill in the middle, external servers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from engine_cases import engine_on, engine_settings, generate, greedy, load
from sockets import Watch
from whole_runs import end, icrl, rows, start, when

from icrl_megatron.engines.protocol import Sampling
from icrl_megatron.engines.sglang_server import Server
from icrl_megatron.telemetry.dumps import Rollouts

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


def kill_server(running: subprocess.Popen[str], log: Path) -> None:
    """SIGKILL for the server that writes this log, as it was started last."""
    port = re.findall(r"^=== .* port (\d+)$", log.read_text(), re.MULTILINE)[-1]
    tree = psutil.Process(running.pid).children(recursive=True)
    servers = [p for p in tree if any(w.endswith("sglang_start.py") for w in p.cmdline()) and port in p.cmdline()]
    os.kill(min(servers, key=lambda p: p.create_time()).pid, signal.SIGKILL)


def batches(log: Path) -> int:
    """Prompts that a server has read since it was ready, in batches."""
    _, ready, since = log.read_text().rpartition("fired up and ready to roll")
    return since.count("Prefill batch") if ready else 0


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(steps(folder)) if path.exists() else 0


def steps(folder: Path) -> list[dict[str, float]]:
    return [row for row in rows(folder) if "engine/requests" in row]


def keys(running: subprocess.Popen[str]) -> set[bytes]:
    """The API keys of the servers below a launcher, which the kernel tells their own user."""
    found = set()
    for process in psutil.Process(running.pid).children(recursive=True):
        with suppress(OSError):
            found |= set(re.findall(rb"ICRL_ENGINE_KEY=([^\0]+)", Path(f"/proc/{process.pid}/environ").read_bytes()))
    return found


def test_three_steps_at_tensor_parallel_2(model: Path, tmp_path: Path) -> None:
    """And what the run listens on, and whether its server's key gets into any of its files."""
    folder = tmp_path / "tp2"
    grid = ("launch.ranks=2", "actor.tensor_parallel=2", "engine.servers=1")
    running = start(*command(folder, model, *grid))
    with Watch(running.pid) as watch:
        when(running, lambda: bool(keys(running)))
        (key,) = keys(running)
        code, out, err = end(running)
    assert code == 0, err
    assert any("sglang" in one.command for one in watch.found) and watch.beyond_loopback() == []
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert folder / "logs" / "sglang_0.log" in written
    assert [path for path in written if key in path.read_bytes()] == []
    assert key.decode() not in out + err
    done = steps(folder)
    assert [row["episodes/played"] for row in done] == [EPISODES] * STEPS
    assert [row["weights/version"] for row in done] == [2, 3, 4]
    assert all(row["actor/mismatch_max"] < 1e-4 for row in done), [row["actor/mismatch_max"] for row in done]
    assert all(row["engine/deaths"] == 0 for row in done)
    assert all(0 < row["engine/cache_hit_rate"] < 1 for row in done)


def test_a_run_at_pipeline_parallel_2_survives_kill_9_of_its_server(qwen2: Path, tmp_path: Path) -> None:
    """A Qwen2.5 on two servers, one for each rank. The share of the other server is not played again."""
    folder = tmp_path / "pp2"
    logs = [folder / "logs" / f"sglang_{number}.log" for number in (0, 1)]
    grid = ("launch.ranks=2", "actor.pipeline_parallel=2", "engine.servers=2")
    running = start(*command(folder, qwen2, *grid))
    when(running, lambda: steps_done(folder) == 1)
    before = batches(logs[0])
    when(running, lambda: batches(logs[0]) > before)
    kill_server(running, logs[0])
    code, _, err = end(running)
    assert code == 0, err
    done = steps(folder)
    assert [row["episodes/played"] for row in done] == [EPISODES] * STEPS
    assert all(row["episodes/dropped"] == 0 for row in done)
    assert all(row["actor/mismatch_max"] < 1e-4 for row in done)
    assert sum(row["engine/deaths"] for row in done) == 1
    assert [log.read_text().count("=== ") for log in logs] == [2, 1]
    assert all("Prefill batch" in log.read_text() for log in logs), "both served"


def test_a_frozen_critic_and_a_server_killed_twice_outside_of_steps(model: Path, tmp_path: Path) -> None:
    """Once in the control report, and once between it and the end of the evaluation."""
    folder = tmp_path / "frozen"
    log, critics = (folder / "logs" / f"sglang_{name}.log" for name in ("0", "critic_0"))
    changes = ("rollout.critic=frozen", "eval.control_problems=16", "steps=1")
    running = start(*command(folder, model, *changes))
    when(running, lambda: log.exists() and batches(log) >= 2)
    assert not (folder / "control_before.json").exists()
    kill_server(running, log)
    when(running, (folder / "control_before.json").exists)
    kill_server(running, log)
    code, _, err = end(running)
    assert code == 0, err
    assert [path.read_text().count("=== ") for path in (log, critics)] == [3, 1]
    (row,) = steps(folder)
    assert (row["episodes/played"], row["engine/deaths"]) == (EPISODES, 0)
    (report,) = json.loads((folder / "control_before.json").read_text()).values()
    assert report["failures"] == report["critique"]["n"] == 16
    assert report["dropped"] == 0
    episodes = Rollouts(folder).episodes(1)
    assert {t.completion.weight_version for e in episodes for a in e.attempts for t in a.turns} == {1}
    assert {c.completion.weight_version for e in episodes for c in e.critiques} == {0}, "the critic has other weights"


def test_others_servers_are_synced_over_a_group(
    server: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "remote"
    monkeypatch.setenv("SERVER_KEY", server.key)
    remote = (f"engine.urls=[{server.url}]", "engine.api_key_env=SERVER_KEY", "steps=1")
    code, _, err = icrl(*command(folder, model, *remote))
    assert code == 0, err
    assert steps(folder)[0]["actor/mismatch_max"] < 1e-4
    assert server.alive()

    # What the run trained and pushed last is what it exported: the engine says what transformers says of that.
    engine, trained = engine_on(server, model, engine_settings()), load(folder / "hf")
    prompts = [[8, 9, 10 + i] for i in range(6)]
    said = generate(engine, [(p, Sampling(0.0, 16, 0, ())) for p in prompts])
    assert [tuple(c.ids.tolist()) for c in said] == [
        greedy(trained, p, 16, trained.config.eos_token_id) for p in prompts
    ]


def test_oversampled_steps_cut_off_the_slow_and_go_on_with_them(
    server: Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "oversampled"
    monkeypatch.setenv("SERVER_KEY", server.key)
    # Few at a time, so that some are in the middle when enough are complete.
    partial = ("rollout.oversample=2", "rollout.partial=true", "rollout.concurrency=5")
    partial = (*partial, "algo.mismatch_correction.enabled=true")
    for until in (STEPS - 1, STEPS):  # the second command resumes the first, with its replay logs
        changes = (f"engine.urls=[{server.url}]", "engine.api_key_env=SERVER_KEY", *partial, f"steps={until}")
        code, _, err = icrl(*command(folder, model, *changes))
        assert code == 0, err
    done = steps(folder)
    assert [row["step"] for row in done] == [1, 2, 3]
    for before, row in zip([{}, *done], done, strict=False):
        spent = row["tokens/generated"] + before.get("tokens/kept", 0.0)
        assert spent == row["tokens/used"] + row["tokens/discarded"] + row["tokens/kept"]
    assert done[1]["tokens/kept"] > 0
    assert all(row["episodes/played"] >= EPISODES for row in done)
    assert sum(row["episodes/cut_off"] for row in done) > 0
    assert all(row["episodes/dropped"] == 0 for row in done)
    # Step n samples with version n: what was kept from the step before has older tokens, and says so.
    replies = [
        (step, turn.completion)
        for step in range(1, STEPS + 1)
        for episode in Rollouts(folder).episodes(step)
        for attempt in episode.attempts
        for turn in attempt.turns
    ]
    assert all(c.weight_version <= step for step, c in replies)
    assert any(c.weight_version < 3 or c.older for step, c in replies if step == 3), "nothing went on after the restart"
    assert all(version < c.weight_version for _, c in replies for version, _ in c.older)
