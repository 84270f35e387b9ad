"""Jobs in containers on the test Slurm, with the real pyxis and enroot.

    PATH=PREFIX/bin:$PATH ICRL_TEST_IMAGE=icrl.sqsh pytest tests/cluster/test_containers.py

The image's python3 must have this project's dependencies; the jobs mount the repository's code. ICRL_TEST_PYXIS has
options of pyxis, such as use_squashfuse=1 for an image that is too large to be unpacked for each step.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from nemo import SLURM, Nemo, failed_after_one_retry
from nemo import arguments as nemo_arguments

from slurm import (
    AGENTGYM,
    FAULTY,
    ROOT,
    SERVER,
    Cluster,
    Done,
    Ended,
    arguments,
    evaluation,
    preempt,
    resumed,
    rows,
    stopped_in_the_middle,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

# A training step takes a fraction of a second, and a preemption one or two seconds.
LONG = "steps=16"
SQUASHFUSE = "use_squashfuse=1" in os.environ.get("ICRL_TEST_PYXIS", "")
INSIDE = ROOT / "tests" / "cluster" / "inside"
SERVED = (*AGENTGYM, f"tasks.sources.0.serve.command=python3 {SERVER} alfworld {{port}} {{host}}")


class Contained:
    """Submits jobs whose steps run in the container image."""

    def __init__(self, cluster: Cluster, image: str) -> None:
        self.cluster = cluster
        # The virtual nodes share a disk, but each needs its own folders for unpacked images, like real nodes.
        self.env = {"XDG_RUNTIME_DIR": f"{cluster.local}/run", "XDG_DATA_HOME": f"{cluster.local}/data"}
        self.env |= {"ICRL_CONTAINER": image, "ICRL_PYTHON": "python3"}

    def sbatch(self, file: str, *words: str, options: tuple[str, ...] = (), **more: str) -> int:
        return self.cluster.sbatch(file, *words, options=options, **{**self.env, **more})

    def ended(self, file: str, *words: str, options: tuple[str, ...] = (), **more: str) -> Ended:
        return self.cluster.ended(self.sbatch(file, *words, options=options, **more))


@pytest.fixture(scope="module")
def contained(cluster: Cluster, image: str) -> Contained:
    return Contained(cluster, image)


@pytest.fixture(scope="module")
def undisturbed(contained: Contained, cluster: Cluster, model: Path) -> Path:
    """An uninterrupted run on two nodes, whose ranks print their root file system."""
    folder = cluster.folder / "contained"
    ended = contained.ended("icrl_8b.sbatch", *arguments(folder, model, LONG), PYTHONPATH=cluster.path(INSIDE))
    assert (ended.state, ended.code) == ("COMPLETED", "0:0"), ended.log
    seen = re.findall(r"rank (\d) sees root (\d+:\d+)", ended.log)
    here = Path("/").stat()
    assert {rank for rank, _ in seen} == {"0", "1"}
    assert f"{here.st_dev}:{here.st_ino}" not in {root for _, root in seen}
    return folder


def test_two_nodes_train_to_the_end(undisturbed: Path) -> None:
    assert rows(undisturbed)[-1]["step"] == 16
    assert (undisturbed / "hf" / "model.safetensors").exists()


def test_job_stopped_by_usr1_resumes_with_the_same_metrics(
    undisturbed: Path, contained: Contained, cluster: Cluster, model: Path
) -> None:
    folder = cluster.folder / "contained_stopped"
    job = contained.sbatch("icrl_8b.sbatch", *arguments(folder, model, LONG))
    stopped_in_the_middle(cluster, job, folder)
    assert rows(folder) == rows(undisturbed)


def test_preempted_job_resumes_with_the_same_metrics(
    undisturbed: Path, contained: Contained, cluster: Cluster, model: Path
) -> None:
    folder = cluster.folder / "contained_preempted"
    job = contained.sbatch("icrl_8b.sbatch", *arguments(folder, model, LONG))
    preempt(cluster, job, folder)
    if SQUASHFUSE:  # the signal also ends squashfuse, so the job resumes from the last checkpoint
        ended = cluster.ended(job)
        assert (ended.state, ended.restarts) == ("COMPLETED", 1), ended.log
        assert re.search(r"ended with \d+ while stopping", ended.log)
        assert "crash 1 of" not in ended.log
    else:
        resumed(cluster, job, folder)
    assert rows(folder) == rows(undisturbed)


def test_failing_rank_ends_the_job_with_its_traceback(contained: Contained, cluster: Cluster, model: Path) -> None:
    folder = cluster.folder / "contained_failing"
    ended = contained.ended("icrl_8b.sbatch", *arguments(folder, model), PYTHONPATH=cluster.path(FAULTY))
    assert ended.state == "FAILED"
    assert "RuntimeError: injected fault of rank 1" in ended.log
    assert "error: crashed twice at -/-" in ended.log


def test_job_and_evaluation_with_environment_servers(contained: Contained, cluster: Cluster, model: Path) -> None:
    folder = cluster.folder / "contained_served"
    ended = contained.ended("icrl_8b.sbatch", *arguments(folder, model, *SERVED, "steps=2"))
    assert (ended.state, ended.code) == ("COMPLETED", "0:0"), ended.log
    assert re.search(r"environment servers of alfworld: http://node\d:\d+", ended.log)
    more = {"ICRL_MOUNTS": f"{model}:{model}"}  # the path occurs only in the run's settings
    ended = contained.ended("eval.sbatch", *evaluation(folder, cluster), options=("--nodes=1",), **more)
    assert (ended.state, ended.code) == ("COMPLETED", "0:0"), ended.log
    found = json.loads((cluster.folder / "eval" / "eval.json").read_text())
    assert [len(scores) for scores in found["successes"].values()] == [2, 2, 2]


@pytest.mark.parametrize(("name", "message"), [("icrl.sqsh", "no such file"), ("text.sqsh", "no squashfs image")])
def test_invalid_image_is_rejected(
    name: str, message: str, contained: Contained, cluster: Cluster, model: Path
) -> None:
    """With bash instead of sbatch, it is rejected before it is queued; otherwise the job fails at its start."""
    (cluster.folder / "text.sqsh").write_text("no image")
    wrong = {**contained.env, "ICRL_CONTAINER": str(cluster.folder / name)}
    words = arguments(cluster.folder / "unborn", model)
    done = cluster.checked("icrl_8b.sbatch", [], words, **wrong)
    assert done.returncode == 2
    assert f"error: ICRL_CONTAINER={cluster.folder / name}: {message}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    ended = cluster.ended(cluster.sbatch("icrl_8b.sbatch", *words, **wrong))
    assert (ended.state, ended.code) == ("FAILED", "2:0")
    assert f"error: ICRL_CONTAINER={cluster.folder / name}: {message}" in ended.log
    assert len(ended.log.splitlines()) == 1


def test_folder_that_is_not_mounted_is_rejected(contained: Contained, cluster: Cluster) -> None:
    ended = contained.ended("eval.sbatch", "/nowhere/run", options=("--nodes=1",))
    assert (ended.state, ended.code) == ("FAILED", "2:0"), ended.log
    assert "error: /nowhere/run: no such folder" in ended.log


class ContainedNemo(Nemo):
    """`icrl launch` with the container image."""

    def __init__(self, contained: Contained, python: str) -> None:
        super().__init__(contained.cluster, python, contained.cluster.folder / "nemo_contained")
        self.contained = contained

    def launch(self, *arguments: str, **more: str) -> Done:
        image = self.contained.env["ICRL_CONTAINER"]
        words = ("--container", image, "--python", "python3", "--ranks-per-node", "1")
        return self("launch", *arguments, *SLURM, *words, **{**self.contained.env, **more})


@pytest.fixture(scope="module")
def icrl_nemo(contained: Contained, nemo: str) -> ContainedNemo:
    return ContainedNemo(contained, nemo)


def test_nemo_run_on_two_nodes(icrl_nemo: ContainedNemo, cluster: Cluster, model: Path) -> None:
    folder = cluster.folder / "nemo_contained_run"
    words = nemo_arguments(folder, model, "launch.nodes=2", "actor.tensor_parallel=2", "actor.sequence_parallel=false")
    done = icrl_nemo.launch(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "hf" / "model.safetensors").exists()


def test_nemo_run_retries_a_failing_rank_once(icrl_nemo: ContainedNemo, cluster: Cluster, model: Path) -> None:
    """The job step detects a repeated crash although its image has no scontrol."""
    folder = cluster.folder / "nemo_contained_failing"
    done = icrl_nemo.launch(*nemo_arguments(folder, model), PYTHONPATH=cluster.path(FAULTY))
    failed_after_one_retry(icrl_nemo, done)
