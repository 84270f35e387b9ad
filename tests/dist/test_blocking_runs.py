"""Real runs whose task code blocks, and that are asked to stop."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from whole_runs import from_model, lines, signalled, start, train, when

from icrl_megatron.distributed.process import STOPPED

pytestmark = [pytest.mark.dist]

BLOCKING = Path(__file__).parents[1] / "blocking"


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_ends_a_hanging_run(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """Every call hangs, and the limit for a call is ten minutes."""
    monkeypatch.setenv("PYTHONPATH", f"{BLOCKING}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    folder = tmp_path / "run"
    running = start(
        *train(folder, *from_model(finished_run)),
        *("tasks.sources=[{name: hangs}]", "rollout.environment_timeout_s=600", f"launch.ranks={ranks}"),
    )
    when(running, lambda: lines(folder) > 0)  # the held-out evaluation is done, and the first step begins
    time.sleep(3)
    begun = time.monotonic()
    code, out, err = signalled(running, signal.SIGTERM)
    assert code == STOPPED, err
    assert time.monotonic() - begun < 60
    assert "a step hangs" in out and lines(folder) == 1
    assert (folder / "checkpoints" / "step_000000" / "icrl.json").exists()
