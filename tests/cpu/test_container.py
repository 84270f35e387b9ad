"""What srun is told about a container: by slurm/container.sh for sbatch's jobs, by launch/container.py for NeMo-Run's.

With the real pyxis and enroot it is tested in tests/cluster.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from icrl_megatron.launch import container, nemo
from icrl_megatron.launch.nemo import Where

Done = subprocess.CompletedProcess[str]
ROOT = Path(__file__).resolve().parents[2]
REGISTRYS = "nvcr.io#nvidia/pytorch:25.08-py3"


def contained(tmp_path: Path, image: str, *words: str, pyxis: str = "--container-image=", **more: str) -> Done:
    """The words that slurm/container.sh puts before a command, one a line; srun is one that only has --help."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    srun = tmp_path / "bin" / "srun"
    srun.write_text(f"#!/bin/bash\necho '{pyxis}'\n")
    srun.chmod(0o755)
    script = f'set -uo pipefail; source {ROOT}/slurm/container.sh; contain "$@"; printf \'%s\\n\' "${{container[@]}}"'
    env = {"PATH": f"{srun.parent}:/usr/bin:/bin", "ICRL_CONTAINER": image, **more}
    command = ["bash", "-c", script, "job", *words]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=30)


def test_a_container_gets_whole_paths_mounts_and_variables(tmp_path: Path) -> None:
    (tmp_path / "icrl.sqsh").write_bytes(b"hsqs....")
    (tmp_path / "shared" / "models").mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "icrl.sqsh").symlink_to(tmp_path / "icrl.sqsh")
    shared = tmp_path / "shared"
    words = [f"run_dir={shared}/runs/new", f"model.path={shared}/models", "seed=1", "/opt/model", "/nowhere/run"]
    more = {"ICRL_MOUNTS": "/a:/b:ro", "NCCL_DEBUG": "INFO", "HF_HOME": "/hf", "OTHER": "1"}
    more["ICRL_LOGS"] = f"{tmp_path}/logs"
    said = contained(checkout, "icrl.sqsh", *words, **more).stdout.splitlines()
    assert said[0] == f"--container-image={checkout}/icrl.sqsh"
    mounts = [f"{checkout}:{checkout}", "/a:/b:ro", f"{tmp_path}/logs:{tmp_path}/logs", f"{shared}:{shared}"]
    assert said[1] == "--container-mounts=" + ",".join(mounts)
    assert said[2:4] == [f"--container-workdir={checkout}", "--container-writable"]
    assert said[4] == "--container-env=HF_HOME,ICRL_CONTAINER,ICRL_LOGS,ICRL_MOUNTS,NCCL_DEBUG"
    assert contained(checkout, REGISTRYS).stdout.startswith("--container-image=nvcr.io#")
    assert contained(checkout, "").stdout.strip() == ""


@pytest.mark.parametrize(
    ("image", "pyxis", "message"),
    [
        ("gone.sqsh", "--container-image=", "no such file on "),
        ("/gone/image", "--container-image=", "no such file on "),
        ("text.sqsh", "--container-image=", "no squashfs image"),
        (REGISTRYS, "", "srun knows no --container-image"),
    ],
)
def test_what_is_wrong_with_an_image(image: str, pyxis: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.sqsh").write_text("text")
    done = contained(tmp_path, image, pyxis=pyxis)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: ICRL_CONTAINER={image}: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_an_image_that_is_a_file_has_its_whole_path(tmp_path: Path) -> None:
    (tmp_path / "icrl.sqsh").write_bytes(b"hsqs....")
    assert container.image("icrl.sqsh", tmp_path, here=True) == str(tmp_path / "icrl.sqsh")
    assert container.image("other.sqsh", Path("/home/me/icrl"), here=False) == "/home/me/icrl/other.sqsh"
    assert container.image(REGISTRYS, tmp_path, here=True) == REGISTRYS


def test_mounts_bring_model_and_run_folder(tmp_path: Path) -> None:
    home, models = tmp_path / "home", tmp_path / "models" / "tiny"
    models.mkdir(parents=True)
    settings = nemo.resolve("quickstart", [f"run_dir={tmp_path}/runs/new"], Where())
    found = container.mounts(home, ["/a:/b:ro"], settings)
    assert found == [f"{home}:{home}", "/a:/b:ro", f"{tmp_path}:{tmp_path}"]
    settings.model.path = "/opt/model"  # perhaps the image's own
    assert container.mounts(home, [f"{tmp_path}:{tmp_path}"], settings) == [f"{home}:{home}", f"{tmp_path}:{tmp_path}"]
