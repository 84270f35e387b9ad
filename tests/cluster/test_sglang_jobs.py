"""Jobs with the real SGLang on a CPU, through sbatch, NeMo-Run and a container. Only the job's Python finds SGLang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from nemo import SLURM, Nemo

from slurm import Cluster, Done, rows

pytestmark = [pytest.mark.cluster, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)]

RECIPE = "rulebook_easy"


def words(folder: Path, model: Path) -> list[str]:
    return [
        f"run_dir={folder}",
        f"model.path={model}",
        "steps=1",
        "warm_start.steps=0",
        "rollout.tasks_per_step=2",
        "rollout.episodes_per_task=2",
        "eval.interval=0",
        "eval.control_problems=0",
        "algo.on_no_signal=train",
        "algo.max_resamples=0",
        "engine.kind=sglang",
        f"engine.python={os.environ['ICRL_ENGINE_PYTHON']}",
    ]


def check(folder: Path) -> None:
    played = [row for row in rows(folder) if "engine/requests" in row]
    assert [row["episodes/played"] for row in played] == [4]
    assert all(row["actor/mismatch_max"] < 1e-4 for row in played)
    assert (folder / "hf" / "model.safetensors").exists()


def test_sbatch(cluster: Cluster, model: Path) -> None:
    folder = cluster.folder / "sglang"
    one_node = ("--nodes=1",)
    ended = cluster.ended(cluster.sbatch("icrl_8b.sbatch", *words(folder, model), options=one_node, RECIPE=RECIPE))
    assert (ended.state, ended.code) == ("COMPLETED", "0:0"), ended.log
    check(folder)


def test_nemo_run(cluster: Cluster, nemo: str, model: Path) -> None:
    """NeMo-Run's own environment has neither torch nor SGLang."""
    folder, home = cluster.folder / "nemo_sglang", cluster.folder / "nemo_sglang_home"
    done = Nemo(cluster, nemo, home).launch(RECIPE, *words(folder, model), *SLURM)
    assert done.returncode == 0, done.stdout + done.stderr
    check(folder)


def test_container(cluster: Cluster, nemo: str, image: str, model: Path) -> None:
    """The image's python3 runs the ranks; the server's Python is mounted."""
    folder, home = cluster.folder / "contained_sglang", cluster.folder / "contained_sglang_home"
    engine = Path(os.environ["ICRL_ENGINE_PYTHON"]).parents[1]
    inside = ("--container", image, "--python", "python3", "--mount", f"{engine}:{engine}", "--ranks-per-node", "1")
    launcher = Nemo(cluster, nemo, home)
    done: Done = launcher("launch", RECIPE, *words(folder, model), *SLURM, *inside)
    assert done.returncode == 0, done.stdout + done.stderr
    check(folder)
