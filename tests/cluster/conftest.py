"""Starts a real Slurm with accounting and four virtual nodes of eight GPUs on this machine, and stops it afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm import ROOT, Cluster, job_environment

HERE = Path(__file__).parent
PORT = "17100"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm of virtual nodes needs root")
    if shutil.which("mariadbd") is None:
        pytest.skip("no mariadbd, which Slurm's accounting needs")
    if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, check=False).returncode:
        pytest.skip("virtual nodes need mount namespaces, which are not allowed here")
    root = Path(
        tempfile.mkdtemp(prefix="icrl-slurm-")
    )  # a short path, because the length of munge's socket path is limited
    plugin = pyxis()
    if plugin is not None:
        (root / "pyxis").mkdir(mode=0o755)
        options = os.environ.get("ICRL_TEST_PYXIS", "")
        (root / "plugstack.conf").write_text(f"required {plugin} runtime_path={root}/pyxis {options}\n")
    env = {**os.environ, "BASE_PORT": PORT}
    try:
        up = subprocess.run(
            ["bash", str(HERE / "up.sh"), str(root), "4", "8"],
            env=env, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert up.returncode == 0, f"Slurm did not start: {up.stdout[-1000:]}{up.stderr[-1000:]}"
        jobs = root / "jobs"
        jobs.mkdir()
        inherited = job_environment() | {"SLURM_CONF": str(root / "slurm.conf"), "ICRL_LOGS": str(jobs / "logs")}
        yield Cluster(inherited, jobs)
    finally:
        subprocess.run(["bash", str(HERE / "down.sh"), str(root)], check=False, timeout=60, capture_output=True)
        shutil.rmtree(root, ignore_errors=True)


def pyxis() -> Path | None:
    """The pyxis plugin under enroot's prefix; None if it or enroot is not installed."""
    enroot = shutil.which("enroot")
    if enroot is None:
        return None
    prefix = Path(enroot).resolve().parents[1]
    return next(iter(sorted(prefix.glob("lib/**/slurm*/spank_pyxis.so"))), None)


@pytest.fixture(scope="session")
def image(cluster: Cluster) -> str:
    """A container image whose python3 has this project's dependencies. Building one takes minutes and 2 GB."""
    if pyxis() is None:
        pytest.skip("pyxis and enroot are not installed")
    named = os.environ.get("ICRL_TEST_IMAGE", "")
    if not named:
        pytest.skip("ICRL_TEST_IMAGE is not set to a squashfs image with this project's dependencies")
    return named


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with random weights and Rulebook's vocabulary."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    code = (
        "import sys; from pathlib import Path; from icrl_megatron.settings.schema import TinyModel; "
        "from icrl_megatron.rollout.prompts import template_words; from icrl_megatron.tasks import registry; "
        "from icrl_megatron.model.tiny import build_tiny; "
        "words = template_words('compact') | set(registry.get('rulebook_easy').vocabulary()); "
        "build_tiny(Path(sys.argv[1]), TinyModel(), sorted(words), seed=0)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, env=job_environment(), check=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def nemo() -> str:
    """The Python interpreter with NeMo-Run, which `make install-nemo` creates."""
    python = os.environ.get("ICRL_NEMO_PYTHON", str(ROOT / ".venv-nemo" / "bin" / "python"))
    if not Path(python).exists():
        pytest.skip("NeMo-Run is not installed: make install-nemo")
    return python
