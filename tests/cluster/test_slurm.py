"""Real jobs on a real Slurm: training over two nodes, stops and requeues, crashes, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from icrl_megatron.telemetry.writer import TIME_PREFIX, Row, read_rows
from slurm import ROOT, TINY, Cluster, icrl, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 4
FILES = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))


def arguments(folder: Path, model: Path, *more: str) -> list[str]:
    return [f"run_dir={folder}", f"model.path={model}", f"steps={STEPS}", *TINY, *more]


def rows(folder: Path) -> list[Row]:
    """metrics.jsonl without what depends on the clock."""
    found = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith((TIME_PREFIX, "memory/"))} for row in found]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, model: Path) -> Path:
    """A run over two nodes that nothing interrupts, with an environment server beside it."""
    folder = cluster.folder / "undisturbed"
    server = {"ICRL_ENV_COMMAND": "exec python3 -m http.server $ICRL_ENV_PORT", "ICRL_ENV_OVERRIDE": "seed=0"}
    job = cluster.sbatch("icrl_8b.sbatch", *arguments(folder, model), **server)
    ended = cluster.ended(job)
    assert (ended.state, ended.code) == ("COMPLETED", "0:0"), ended.log
    assert re.search(r"environment servers at http://node\d:\d+", ended.log)
    steps = cluster.run("sacct", "-n", "-P", "-j", str(job), "-o", "JobID,State").stdout
    assert f"{job}.1|" in steps  # nodes that see the folder, the servers, and the ranks
    assert "RUNNING" not in steps  # the servers ended with the job
    return folder


def test_two_nodes_train_to_the_end(undisturbed: Path) -> None:
    found = rows(undisturbed)
    assert found[-1]["step"] == STEPS
    assert (undisturbed / "hf" / "model.safetensors").exists()
    assert "tensor_parallel: 2" in (undisturbed / "settings.yaml").read_text()


def test_usr1_saves_requeues_and_goes_on_to_the_same_metrics(undisturbed: Path, cluster: Cluster, model: Path) -> None:
    folder = cluster.folder / "stopped"
    job = cluster.sbatch("icrl_8b.sbatch", *arguments(folder, model))
    metrics = folder / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, lambda: cluster.log(job), 150)
    # What Slurm itself does --signal=B:USR1@120 before the time limit.
    assert cluster.run("scancel", "--batch", "--signal=USR1", str(job)).returncode == 0
    ended = cluster.ended(job)
    assert (ended.state, ended.restarts) == ("COMPLETED", 1), ended.log
    assert ended.log.count("stopped on request at") == 1
    assert "resuming from" in ended.log
    stopped_at = int(re.search(r"stopped on request at -/(\d+)", ended.log)[1])  # type: ignore[index]
    assert stopped_at < STEPS
    assert rows(folder) == rows(undisturbed)


def test_a_failing_rank_ends_the_job_with_its_traceback(cluster: Cluster, model: Path) -> None:
    folder = cluster.folder / "failing"
    faulty = str(ROOT / "tests" / "cluster" / "faulty") + ":" + cluster.env["PYTHONPATH"]
    ended = cluster.ended(cluster.sbatch("icrl_8b.sbatch", *arguments(folder, model), PYTHONPATH=faulty))
    assert ended.state == "FAILED"
    assert "Traceback (most recent call last)" in ended.log
    assert "RuntimeError: injected fault of rank 1" in ended.log
    assert "trying again in 0.5 s" in ended.log
    assert ended.log.count("crash 1 of at most 3") == 1
    assert "error: crashed twice at -/-" in ended.log  # not a third time


@pytest.mark.parametrize("file", FILES)
def test_slurm_accepts_every_file(file: str, cluster: Cluster) -> None:
    done = cluster.run("sbatch", "--test-only", "--account=icrl", f"slurm/{file}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.path=/nowhere/Qwen3-8B", "error: model.path=/nowhere/Qwen3-8B: no such folder"),
        ("actor.tensor_parallel=4", "does not divide the 2 ranks"),
        ("actor.tensor_paralel=2", "did you mean actor.tensor_parallel?"),
    ],
)
def test_what_is_wrong_ends_the_job_at_once(change: str, message: str, cluster: Cluster, model: Path) -> None:
    ended = cluster.ended(cluster.sbatch("icrl_8b.sbatch", *arguments(cluster.folder / "wrong", model, change)))
    assert (ended.state, ended.code) == ("FAILED", "2:0")
    assert message in ended.log
    assert "Traceback" not in ended.log


def test_a_resume_with_other_settings_is_refused(undisturbed: Path, cluster: Cluster, model: Path) -> None:
    ended = cluster.ended(cluster.sbatch("icrl_8b.sbatch", *arguments(undisturbed, model, "optim.learning_rate=1e-3")))
    assert (ended.state, ended.code) == ("FAILED", "2:0")
    assert "holds a run with other settings: optim.learning_rate" in ended.log


def test_a_multi_node_recipe_is_not_started_on_one_machine(cluster: Cluster, model: Path) -> None:
    command = [*icrl(), "train", "qwen3_8b_2nodes", *arguments(cluster.folder / "alone", model)]
    done = cluster.run(*command, timeout_s=120)
    assert done.returncode == 2
    assert "launch.nodes=2: this command starts ranks on one machine" in done.stderr
