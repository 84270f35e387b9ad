"""NeMo-Run on this machine and on a real Slurm: the same settings as sbatch, exit codes, messages, snapshots."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from nemo import RECIPE, SLURM, Nemo, arguments, failed_after_one_retry, job_of, launched

from icrl_megatron.distributed import net
from slurm import AGENTGYM, FAULTY, ROOT, Cluster, icrl, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

SNAPSHOTS = Path(__file__).parent / "snapshots"


@pytest.fixture(scope="module")
def icrl_nemo(cluster: Cluster, nemo: str) -> Nemo:
    return Nemo(cluster, nemo, cluster.folder / "nemo")


def resolved(folder: Path) -> dict[str, object]:
    saved = yaml.safe_load((folder / "settings.yaml").read_text())
    assert saved.pop("run_dir") == str(folder)
    return dict(saved)


def test_local_and_slurm_run_the_same_settings(icrl_nemo: Nemo, cluster: Cluster, model: Path) -> None:
    here, there = cluster.folder / "nemo_local", cluster.folder / "nemo_slurm"
    local = icrl_nemo.launch(*arguments(here, model))
    assert local.returncode == 0, local.stdout + local.stderr
    remote = icrl_nemo.launch(*arguments(there, model, "launch.nodes=1"), *SLURM)
    assert remote.returncode == 0, remote.stdout + remote.stderr
    assert resolved(here) == resolved(there)
    printed = cluster.run(*icrl(), "train", *arguments(here, model), "--dry-run")
    plain = yaml.safe_load(printed.stdout)
    plain.pop("run_dir")
    assert plain == resolved(here)
    for folder in (here, there):
        assert (folder / "hf" / "model.safetensors").exists()

    experiment = launched(remote)
    shown = icrl_nemo("status", experiment)
    assert shown.returncode == 0
    assert "SUCCEEDED" in shown.stdout
    told = icrl_nemo("logs", experiment)
    assert told.returncode == 0
    assert "rulebook_easy" in told.stdout + told.stderr  # the run's final table


@dataclass(frozen=True)
class LoginNode:
    """A machine with Slurm's clients that is reached through ssh."""

    host: str
    port: int
    key: Path
    home: Path
    path: str
    """PATH with an ssh that knows the machine; the user's known_hosts is not changed."""


@pytest.fixture
def login_node(cluster: Cluster) -> Iterator[LoginNode]:
    """A separate sshd; only the processes that it starts have the cluster's environment."""
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    if sshd is None or shutil.which("ssh-keygen") is None or shutil.which("rsync") is None:
        pytest.skip("no openssh-server or rsync: make system-packages")
    folder, address, port = cluster.folder / "login", "127.0.0.1", net.free_port()
    home = folder / "home"
    home.mkdir(parents=True)
    (home / "slurm").symlink_to(ROOT / "slurm")
    ssh = shutil.which("ssh")
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {ssh} -o UserKnownHostsFile={folder}/known_hosts "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True, timeout=30)
    (folder / "known_hosts").write_text(f"[{address}]:{port} {(folder / 'host.pub').read_text()}")
    carried = {
        name: value for name, value in cluster.env.items() if name.startswith(("ICRL_", "SLURM_", "PYTHON", "OMP_"))
    }
    lines = [
        f"ListenAddress {address}:{port}",
        f"HostKey {folder / 'host'}",
        f"AuthorizedKeysFile {folder / 'user.pub'}",
        f"PidFile {folder / 'sshd.pid'}",
        "StrictModes no",
        "UsePAM no",
        "SetEnv " + " ".join(f'"{name}={value}"' for name, value in carried.items()),
    ]
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "sshd.log").open("w") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        until(lambda: reachable(address, port) or server.poll() is not None, (folder / "sshd.log").read_text, 20)
        assert server.poll() is None, (folder / "sshd.log").read_text()
        yield LoginNode(address, port, folder / "user", home, f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    finally:
        server.kill()
        server.wait(timeout=20)


def reachable(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


def test_a_launch_through_an_ssh_tunnel(
    icrl_nemo: Nemo, login_node: LoginNode, cluster: Cluster, model: Path, tmp_path: Path
) -> None:
    folder = cluster.folder / "nemo_tunnel"
    tunnel = ["--host", login_node.host, "--port", str(login_node.port), "--user", "root"]
    tunnel += ["--identity", str(login_node.key), "--remote-home", str(login_node.home)]
    # Here nothing knows of the cluster.
    here = {"SLURM_CONF": str(tmp_path / "nowhere"), "PATH": login_node.path}
    done = icrl_nemo.launch(*arguments(folder, model), *SLURM, *tunnel, **here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "hf" / "model.safetensors").exists()
    assert list((login_node.home / "runs" / "launched").rglob("sbatch_*.out")), "its log lies behind the tunnel"
    shown = icrl_nemo("status", launched(done), **here)
    assert shown.returncode == 0 and "SUCCEEDED" in shown.stdout, shown.stdout + shown.stderr


def test_environment_servers_on_one_machine(icrl_nemo: Nemo, cluster: Cluster, model: Path) -> None:
    folder = cluster.folder / "nemo_served"
    done = icrl_nemo.launch(*arguments(folder, model, *AGENTGYM))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "environment servers of alfworld: http://127.0.0.1:" in done.stdout + done.stderr
    assert (folder / "hf" / "model.safetensors").exists()


def test_broken_model_gives_exit_code_1(icrl_nemo: Nemo, cluster: Cluster, model: Path) -> None:
    # Only the ranks detect it: the tokenizer file exists but is invalid.
    broken = cluster.folder / "broken"
    cluster.run("cp", "-r", str(model), str(broken))
    (broken / "tokenizer.json").write_text("{}")
    done = icrl_nemo.launch(*arguments(cluster.folder / "nemo_failed", broken))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the tokenizer cannot be loaded" in done.stdout + done.stderr


def test_failing_rank_is_retried_once_with_its_traceback(icrl_nemo: Nemo, cluster: Cluster, model: Path) -> None:
    folder = cluster.folder / "nemo_failing"
    done = icrl_nemo.launch(*arguments(folder, model), *SLURM, PYTHONPATH=cluster.path(FAULTY))
    assert failed_after_one_retry(icrl_nemo, done).count("crash 1 of at most 3") == 1


def test_detached_job_can_be_followed_and_cancelled(icrl_nemo: Nemo, cluster: Cluster, model: Path) -> None:
    folder = cluster.folder / "nemo_cancelled"
    begun = icrl_nemo.launch(*arguments(folder, model, "steps=5000"), *SLURM, "--detach")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    experiment = launched(begun)
    job = job_of(icrl_nemo, experiment)
    until((folder / "metrics.jsonl").exists, lambda: icrl_nemo("logs", experiment).stdout, 150)
    assert icrl_nemo("cancel", experiment).returncode == 0
    assert cluster.ended(job).state == "CANCELLED"
    until(lambda: cluster.run("squeue", "-h", "-j", str(job)).stdout.strip() == "", lambda: "", 60)
    assert cluster.accounted(job)[2] == 0  # it was not requeued
    assert icrl_nemo("status", experiment).returncode == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--account", "nobody"], "Slurm would not take 1 nodes of 1 GPUs with --account=nobody"),
        (["--partition", "nowhere"], "--partition=nowhere"),
        (["model.path=/nowhere/Qwen3-8B"], "model.path=/nowhere/Qwen3-8B: no such folder"),
        (["launch.nodes=8"], "Slurm would not take 8 nodes of 1 GPUs"),
        (["actor.tensor_parallel=3"], "does not divide"),
        (["--on", "moon"], "choose local or slurm"),
    ],
)
def test_errors_are_reported_before_anything_is_queued(
    more: list[str], message: str, icrl_nemo: Nemo, cluster: Cluster, model: Path
) -> None:
    done = icrl_nemo.launch(*arguments(cluster.folder / "nemo_wrong", model), *SLURM, *more)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["bare", "container", "site"])
def test_generated_script_equals_the_snapshot(kind: str, icrl_nemo: Nemo, cluster: Cluster, model: Path) -> None:
    (cluster.folder / "modules.sh").touch()
    site = ["--qos", "normal", "--gres", "gpu:1", "--constraint", "a&b", "--reservation", "r", "--cpus-per-task", "2"]
    more = {
        "container": ["--container", "registry.example/icrl:1"],
        "site": [*site, "--env", "NAME=a b", "--prologue", str(cluster.folder / "modules.sh")],
    }.get(kind, [])
    done = icrl_nemo.launch(*arguments(cluster.folder / "nemo_dry", model), *SLURM, *more, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    script = normalised(done.stdout, cluster, model)
    path = SNAPSHOTS / f"nemo_slurm_{kind}.sh"
    if os.environ.get("ICRL_WRITE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
    assert script == path.read_text()


def normalised(output: str, cluster: Cluster, model: Path) -> str:
    """The generated script without parts that differ between machines and runs."""
    script = output[output.index("#!/bin/bash") :]
    known = {cluster.env["ICRL_PYTHON"]: "PYTHON", str(cluster.folder): "CLUSTER", str(model): "MODEL"}
    for path, name in {**known, str(ROOT): "CHECKOUT"}.items():
        script = script.replace(path, name)
    script = re.sub(rf"icrl-{RECIPE}_\d+", "EXPERIMENT", script)
    return "\n".join(line.rstrip() for line in script.strip().splitlines()) + "\n"


def test_factories_have_the_same_settings(nemo: str, cluster: Cluster) -> None:
    code = (
        "from icrl_megatron.launch import nemo; from icrl_recipes import registry; import nemo_run as run; "
        "assert nemo.register_factories() == list(registry()); "
        f"task = nemo.partial('{RECIPE}', ['steps=3']); assert isinstance(task, run.Partial); "
        f"assert (task.recipe, task.overrides) == ('{RECIPE}', ['steps=3'])"
    )
    done = cluster.run(nemo, "-c", code, timeout_s=120)
    assert done.returncode == 0, done.stderr
