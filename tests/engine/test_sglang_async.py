"""An asynchronous run on the real SGLang: weights arrive while requests are unfinished, and its server is killed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from whole_runs import end, rows, start, when

from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.types import Completion

pytestmark = [pytest.mark.engine, pytest.mark.dist, pytest.mark.slow]
STEPS = 6


def command(folder: Path, model: Path) -> list[str]:
    return [
        *("train", "rulebook_easy", f"run_dir={folder}", f"steps={STEPS}", f"model.path={model}"),
        *("warm_start.steps=0", "rollout.tasks_per_step=4", "rollout.episodes_per_task=4"),
        *("eval.problems=4", "eval.interval=0", "eval.control_problems=2", "algo.on_no_signal=train"),
        *("algo.max_resamples=0", "engine.kind=sglang", f"engine.python={os.environ['ICRL_ENGINE_PYTHON']}"),
        *("rollout.staleness=2", "algo.mismatch_correction.enabled=true", "telemetry.dump=all"),
    ]


def completions(folder: Path, step: int) -> list[Completion]:
    episodes = Rollouts(folder).episodes(step)
    said = [t.completion for e in episodes for a in e.attempts for t in a.turns]
    return said + [c.completion for e in episodes for c in e.critiques]


@pytest.mark.parametrize("interleave", [False, True])
def test_weights_arrive_in_flight_and_a_killed_server_gets_the_current_ones(
    model: Path, tmp_path: Path, interleave: bool
) -> None:
    folder = tmp_path / "run"
    log = folder / "logs" / "sglang_0.log"
    running = start(*command(folder, model), f"rollout.interleave={str(interleave).lower()}")
    when(running, lambda: any("engine/requests" in row for row in rows(folder)))
    port = re.findall(r"^=== .* port (\d+)$", log.read_text(), re.MULTILINE)[-1]
    tree = psutil.Process(running.pid).children(recursive=True)
    servers = [p for p in tree if any(w.endswith("sglang_start.py") for w in p.cmdline()) and port in p.cmdline()]
    os.kill(min(servers, key=lambda p: p.create_time()).pid, signal.SIGKILL)
    code, out, err = end(running)
    assert code == 0, err
    assert (out + err).count("engine lost, restarting it") == 1
    done = [row for row in rows(folder) if "tokens/generated" in row]
    assert [row["step"] for row in done] == list(range(1, STEPS + 1))
    assert sum(row["staleness/lost_engines"] for row in done) == 1
    assert log.read_text().count("=== ") == 2, "it was started again"
    slept, woke = (log.read_text().count(f"POST /{what}_memory_occupation") for what in ("release", "resume"))
    if interleave:  # it may have been killed while it slept or woke
        assert STEPS - 1 <= slept <= STEPS and 2 * STEPS - 2 <= woke <= 2 * STEPS
    else:
        assert slept == woke == 0
    measured = [row["actor/mismatch_max"] for row in done if row.get("actor/mismatched", 0)]
    assert max(measured) < 1e-4, "tokens of the current version have the trainer's log-probs"
    assert len(measured) >= STEPS - 2, "steps have probes, except while the server is restarted"
    assert any(row.get("actor/drift_abs", 0.0) > 0 for row in done)
    assert all(row["episodes/dropped"] == 0 for row in done)
    for step in range(1, STEPS + 1):
        versions = {v for c in completions(folder, step) for v in (c.weight_version, *(v for v, _ in c.older))}
        assert versions <= {step - 2, step - 1, step} - {-1, 0}, "none is older than rollout.staleness"
