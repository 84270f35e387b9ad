"""srun's options for a container, from slurm/container.sh (sbatch jobs) and launch/container.py (NeMo-Run).

tests/cluster runs them with the real pyxis and enroot.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Done, run

from icrl_megatron.launch import container, nemo
from icrl_megatron.launch.nemo import Where

ROOT = Path(__file__).resolve().parents[2]
REGISTRY_IMAGE = "nvcr.io#nvidia/pytorch:25.08-py3"


def contained(tmp_path: Path, image: str, *words: str, pyxis: str = "--container-image=", **more: str) -> Done:
    """The words that slurm/container.sh puts before a command, one per line, with an srun that only has --help."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    srun = tmp_path / "bin" / "srun"
    srun.write_text(f"#!/bin/bash\necho '{pyxis}'\n")
    srun.chmod(0o755)
    script = f'set -uo pipefail; source {ROOT}/slurm/container.sh; contain "$@"; printf \'%s\\n\' "${{container[@]}}"'
    env = {"PATH": f"{srun.parent}:/usr/bin:/bin", "ICRL_CONTAINER": image, **more}
    return run("bash", "-c", script, "job", *words, cwd=tmp_path, env=env)


def test_a_container_gets_absolute_paths_mounts_and_variables(tmp_path: Path) -> None:
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
    assert contained(checkout, REGISTRY_IMAGE).stdout.startswith("--container-image=nvcr.io#")
    assert contained(checkout, "").stdout.strip() == ""


@pytest.mark.parametrize(
    ("image", "pyxis", "message"),
    [
        ("gone.sqsh", "--container-image=", "no such file on "),
        ("/gone/image", "--container-image=", "no such file on "),
        ("text.sqsh", "--container-image=", "no squashfs image"),
        (REGISTRY_IMAGE, "", "srun knows no --container-image"),
    ],
)
def test_an_invalid_image_is_refused(image: str, pyxis: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.sqsh").write_text("text")
    done = contained(tmp_path, image, pyxis=pyxis)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: ICRL_CONTAINER={image}: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_the_path_of_an_image_file_is_made_absolute(tmp_path: Path) -> None:
    (tmp_path / "icrl.sqsh").write_bytes(b"hsqs....")
    assert container.image("icrl.sqsh", tmp_path, here=True) == str(tmp_path / "icrl.sqsh")
    assert container.image("other.sqsh", Path("/home/me/icrl"), here=False) == "/home/me/icrl/other.sqsh"
    assert container.image(REGISTRY_IMAGE, tmp_path, here=True) == REGISTRY_IMAGE


def test_mounts_include_the_folders_of_model_and_run(tmp_path: Path) -> None:
    home, models = tmp_path / "home", tmp_path / "models" / "tiny"
    models.mkdir(parents=True)
    settings = nemo.resolve("quickstart", [f"run_dir={tmp_path}/runs/new"], Where())
    found = container.mounts(home, ["/a:/b:ro"], settings)
    assert found == [f"{home}:{home}", "/a:/b:ro", f"{tmp_path}:{tmp_path}"]
    settings.model.path = "/opt/model"  # could be inside the image
    assert container.mounts(home, [f"{tmp_path}:{tmp_path}"], settings) == [f"{home}:{home}", f"{tmp_path}:{tmp_path}"]
