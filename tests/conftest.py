"""Skips tests that this machine cannot run, with the reason; keeps torch from oversubscribing the cores."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import shutil
import sys
from pathlib import Path

import hypothesis
import pytest

# A deadline per example would measure the machine's load, not the code.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether this machine or container has a GPU; in a container the first may be /dev/nvidia5."""
    return any(devices.glob("nvidia[0-9]*"))


if not has_gpu():  # before triton is imported: without a GPU its interpreter runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

SLURM_PARTS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged")


def _missing() -> dict[str, str]:
    """Marker -> the reason why its tests cannot run here."""
    import torch

    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if not os.environ.get("ICRL_ENGINE_PYTHON"):
        reasons["engine"] = "no interpreter with SGLang: `make test-engine` creates one"
    absent = [part for part in SLURM_PARTS if shutil.which(part) is None]
    if absent:
        reasons["cluster"] = f"no {', '.join(absent)}"
    return reasons


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first, so that no pytest-xdist worker runs one alone at the end.
    items.sort(key=lambda item: item.get_closest_marker("dist") is None)
    if not any(item.get_closest_marker(name) for item in items for name in ("gpu", "engine", "cluster")):
        return
    reasons = _missing()
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that is a coroutine in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}))
    return True


def pytest_collection_finish() -> None:
    gc.freeze()  # the imported modules stay; without this, each full collection visits them again


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small uninterrupted run: warm start, training, report. Other tests start from the model in its
    `warm_start/hf`."""
    from whole_runs import WARM_START, icrl, train

    folder = tmp_path_factory.mktemp("finished") / "run"
    code, _, err = icrl(*train(folder, *WARM_START))
    assert code == 0, err
    return folder
