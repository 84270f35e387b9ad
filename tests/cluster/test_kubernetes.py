"""The JobSet: its Job against Kubernetes' own schema, and its containers' command as two processes on this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from whole_runs import rows

from icrl_megatron.distributed import net
from slurm import ROOT, arguments, job_environment

pytestmark = [pytest.mark.dist, pytest.mark.slow]

FILE = ROOT / "kubernetes" / "icrl_8b_2nodes.yaml"
LABELS = {"jobset.sigs.k8s.io/jobset-name": "icrl-8b", "jobset.sigs.k8s.io/restart-attempt": "0"}


def jobset() -> Any:
    return yaml.safe_load(FILE.read_text())


def container() -> Any:
    (replicated,) = jobset()["spec"]["replicatedJobs"]
    (found,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    return found


def test_the_job_satisfies_the_schema_of_kubernetes() -> None:
    (replicated,) = jobset()["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "ranks"}, **replicated["template"]}
    kubernetes_validate.validate(job, "1.37", strict=True)
    del job["spec"]["template"]["spec"]["containers"][0]["name"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_numbers_of_nodes_and_names_agree() -> None:
    found = jobset()
    (replicated,) = found["spec"]["replicatedJobs"]
    job, env = replicated["template"]["spec"], {one["name"]: one.get("value") for one in container()["env"]}
    assert str(job["completions"]) == str(job["parallelism"]) == env["ICRL_NODES"]
    assert env["ICRL_RANKS_PER_NODE"] == container()["resources"]["limits"]["nvidia.com/gpu"]
    name = found["metadata"]["name"]
    assert env["MASTER_ADDR"] == f"{name}-{replicated['name']}-0-0.{name}"
    assert [rule["name"] for rule in found["spec"]["failurePolicy"]["rules"]] == ["wrongsetting"]  # names are required
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container()["name"]
    assert env["ICRL_STOP"] in " ".join(container()["lifecycle"]["preStop"]["exec"]["command"])


def pods(folder: Path, words: list[str], restart: int = 0) -> list[subprocess.Popen[str]]:
    """The container of each node as a process, with the manifest's own variables except addresses and sizes."""
    given = {one["name"]: one.get("value") or LABELS[label(one)] for one in container()["env"]}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(net.free_port()), "ICRL_RANKS_PER_NODE": "1"}
    given |= {"ICRL_LOGS": str(folder / "jobs"), "ICRL_RESTART": str(restart)}
    of_jobs = {name: value for name, value in job_environment().items() if name != "ICRL_RANKS_PER_NODE"}
    env = of_jobs | given | {"ICRL_PYTHON": of_jobs["ICRL_PYTHON"]}
    return [
        subprocess.Popen(
            [*container()["command"], *container()["args"][:2], *words],
            env=env | {"JOB_COMPLETION_INDEX": str(node), "ICRL_STOP": str(folder / f"stop_{node}")},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for node in range(2)
    ]


def label(variable: Any) -> str:
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    return re.fullmatch(r"metadata\.labels\['(.+)'\]", path)[1]  # type: ignore[index]


def ended(nodes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    try:
        said = [node.communicate(timeout=240)[1] for node in nodes]
        return [node.returncode for node in nodes], "\n".join(said)
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_two_pods_train_stop_on_request_and_resume(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*arguments(run, model), "checkpoint.interval=100"]
    (tmp_path / "stop_1").touch()  # what preStop does, on one node only
    codes, said = ended(pods(tmp_path, words))
    assert codes == [75, 75], said
    (tmp_path / "stop_1").unlink()
    stopped = rows(run)[-1]["step"]
    codes, said = ended(pods(tmp_path, words, restart=1))
    assert codes == [0, 0], said
    assert "resuming from" in said
    assert stopped < rows(run)[-1]["step"] == 4


def test_a_wrong_setting_ends_with_the_code_that_is_not_restarted(model: Path, tmp_path: Path) -> None:
    codes, said = ended(pods(tmp_path, [*arguments(tmp_path / "run", model), "actor.tensor_parallel=3"]))
    assert codes == [2, 2], said
    assert "does not divide the 2 ranks" in said
