"""Runs on SGLang with deterministic inference and one request at a time are equal in every float, also after kills.

ICRL_DETERMINISTIC_STEPS: steps of each run (6; 30 takes some minutes).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cpu_deterministic
import pytest
from test_sglang_runs import kill_server, steps, steps_done
from whole_runs import end, icrl, kill_tree, start, when

from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.rollout.prompts import template_words
from icrl_megatron.settings.schema import TinyModel
from icrl_megatron.tasks import registry

pytestmark = [pytest.mark.engine, pytest.mark.dist, pytest.mark.slow]

STEPS = int(os.environ.get("ICRL_DETERMINISTIC_STEPS", "6"))
FLAG = "engine.server_args=[--enable-deterministic-inference]"
VARYING = ("engine/deaths", "engine/cache_hit_rate", "engine/requests", "engine/retries")
"""Metrics of a step that a kill may change: what the engine did before it."""


@pytest.fixture(scope="module")
def household(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the words of Household, whose episodes have several turns."""
    folder = tmp_path_factory.mktemp("deterministic") / "model"
    words = template_words("compact") | set(registry.get("household").vocabulary())  # type: ignore[attr-defined]
    build_tiny(folder, TinyModel(), sorted(words), seed=0)
    return folder


def python(folder: Path) -> Path:
    """The interpreter with SGLang and the plugin."""
    packages = folder / "packages"
    about = packages / f"{cpu_deterministic.NAME}-1.dist-info"
    about.mkdir(parents=True)
    shutil.copy(cpu_deterministic.__file__, packages)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {cpu_deterministic.NAME}\nVersion: 1\n")
    entry = f"{cpu_deterministic.NAME} = {cpu_deterministic.NAME}:register"
    (about / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{entry}\n")
    made = folder / "python"
    made.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {os.environ["ICRL_ENGINE_PYTHON"]} "$@"\n')
    made.chmod(0o755)
    return made


def command(folder: Path, model: Path, python: Path | str) -> list[str]:
    return [
        *("train", "household", f"run_dir={folder}", f"steps={STEPS}", f"model.path={model}"),
        *("warm_start.steps=0", "eval.interval=0", "eval.problems=4", "eval.control_problems=0"),
        *("rollout.tasks_per_step=2", "rollout.episodes_per_task=4", "rollout.concurrency=1"),
        *("rollout.max_turns=3", "rollout.max_turn_tokens=8", "rollout.max_critique_tokens=8"),
        *("rollout.parse_truncated=true", "checkpoint.interval=1"),  # else a reply that is cut off ends its attempt
        *("algo.on_no_signal=train", "algo.max_resamples=0", "optim.learning_rate=1e-4"),
        *("engine.kind=sglang", f"engine.python={python}", FLAG),
    ]


def floats(folder: Path) -> list[dict[str, float]]:
    return [{n: v for n, v in row.items() if not n.startswith(VARYING)} for row in steps(folder)]


def test_runs_are_equal_after_kills_of_the_trainer_and_the_engine(household: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    engine = python(tmp_path)
    code, _, err = icrl(*command(whole, household, engine))
    assert code == 0, err

    running = start(*command(killed, household, engine))
    when(running, lambda: steps_done(killed) == STEPS // 3)
    kill_tree(running)
    running = start(*command(killed, household, engine))
    when(running, lambda: steps_done(killed) == 2 * STEPS // 3)
    kill_server(running, killed / "logs" / "sglang_0.log")
    code, _, err = end(running)
    assert code == 0, err

    expected, found = floats(whole), floats(killed)
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    assert len({row["actor/grad_norm"] for row in expected}) == STEPS
    assert all(row["attempt/turns"] > 1.5 for row in expected)
    assert found == expected
    assert sum(row["engine/deaths"] for row in steps(killed)) == 1


def test_stock_sglang_on_a_cpu_refuses(household: Path, tmp_path: Path) -> None:
    code, _, err = icrl(*command(tmp_path / "run", household, os.environ["ICRL_ENGINE_PYTHON"]))
    assert code != 0 and "attention backends are supported for deterministic inference" in err
