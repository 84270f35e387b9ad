"""A run whose engine has a rank of its own (`launch.engine_ranks`), on the real SGLang: it is sent deltas, its server
is killed, and nothing of it is left at the end."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest
from whole_runs import end, ranks_below, rows, start, when

from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.utils import processes

pytestmark = [pytest.mark.engine, pytest.mark.dist, pytest.mark.slow]
STEPS = 4


def command(folder: Path, model: Path) -> list[str]:
    return [
        *("train", "rulebook_easy", f"run_dir={folder}", f"steps={STEPS}", f"model.path={model}"),
        *("launch.ranks=3", "launch.engine_ranks=1", "rollout.staleness=1", "algo.mismatch_correction.enabled=true"),
        *("engine.kind=sglang", f"engine.python={os.environ['ICRL_ENGINE_PYTHON']}", "engine.sync=delta"),
        *("warm_start.steps=0", "rollout.tasks_per_step=4", "rollout.episodes_per_task=4", "telemetry.dump=all"),
        *("eval.problems=4", "eval.interval=0", "eval.control_problems=0", "algo.on_no_signal=train"),
        "algo.max_resamples=0",
    ]


def servers(launcher: int) -> list[psutil.Process]:
    """The main processes of the servers below a launcher."""
    found = []
    for process in processes.tree(launcher):
        with contextlib.suppress(psutil.Error):  # it ends meanwhile
            if any(word.endswith("sglang_start.py") for word in process.cmdline()):
                found.append(process)
    return found


def schedules(process: psutil.Process) -> bool:
    """Whether it is SGLang's scheduler, which holds the memory of a GPU."""
    with contextlib.suppress(psutil.Error):  # it ends meanwhile
        return process.cmdline()[:1] == ["sglang::scheduler"]
    return False


def test_an_engine_on_its_own_rank_is_sent_deltas_and_restarted(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    running = start(*command(folder, model))
    when(running, lambda: any("engine/requests" in row for row in rows(folder)))
    ranks, (server,) = ranks_below(running.pid), servers(running.pid)
    assert len(ranks) == 2, "the third one serves"
    tree = processes.tree(server.pid)
    os.kill(server.pid, signal.SIGKILL)
    when(running, lambda: any(one.pid != server.pid for one in servers(running.pid)))
    again = next(one for one in servers(running.pid) if one.pid != server.pid)
    when(running, lambda: any(map(schedules, processes.tree(again.pid))))
    tree += processes.tree(again.pid)
    code, _, err = end(running)
    assert code == 0, err

    done = [row for row in rows(folder) if "tokens/generated" in row]
    assert [row["step"] for row in done] == list(range(1, STEPS + 1))
    assert [row["weights/version"] for row in done] == list(range(2, STEPS + 2))
    assert sum(row["staleness/lost_engines"] for row in done) == 1
    assert sum(row.get("engine/full_pushes", 0) for row in done) == 2, "at first, and after the restart"
    measured = [row["actor/mismatch_max"] for row in done if row.get("actor/mismatched", 0)]
    assert measured and max(measured) < 1e-4, "fresh tokens have the trainer's log-probs"
    assert all(row["episodes/dropped"] == 0 for row in done)
    newest = 0
    for step in range(1, STEPS + 1):
        played = Rollouts(folder).episodes(step)
        said = [turn.completion for e in played for attempt in e.attempts for turn in attempt.turns]
        versions = {c.weight_version for c in said}
        assert len(played) == 16 and versions <= {step - 1, step} - {0}, "none is older than rollout.staleness"
        newest = max(newest, *versions)
    assert newest > 1, "new weights reach the engine"

    logs = sorted(path.name for path in (folder / "logs").glob("sglang*"))
    assert logs == ["sglang_0.log"] and (folder / "logs" / logs[0]).read_text().count("=== ") == 2
    assert not psutil.wait_procs(tree, timeout=30)[1], "no process of a server is left"
