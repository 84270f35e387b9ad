"""Context parallelism does not change results: eight real gloo ranks against one process with Hugging Face's model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from commands import python
from context_worker import LOADER, REFUSING, SAVER, TRAINED
from grid_cases import CASES, CONTEXT_LAYOUTS, Trained, model_folder
from grid_reference import Reference, apart, check_training
from test_grids import make_model

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]
WORKER = Path(__file__).with_name("context_worker.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("context")
    for name in {CASES[case].model for cases in TRAINED.values() for case in cases}:
        make_model(model_folder(root, name), name, torch.float32)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    job = python(WORKER, root, env=environment, timeout=500)
    assert job.returncode == 0, job.stderr[-6000:]
    return root


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str, Trained]:
    names = {case for cases in TRAINED.values() for case in cases}
    return {name: Reference(CASES[name], model_folder(root, CASES[name].model)).run() for name in names}


@pytest.mark.parametrize(("layout", "case"), [(layout, case) for layout in TRAINED for case in TRAINED[layout]])
def test_training_equals_the_reference(root: Path, references: dict[str, Trained], layout: str, case: str) -> None:
    """Compares log-probs, losses, norms, all gradients of all updates, and the weights after two steps. Ranks stop by
    themselves if the ratio of the first step is not 1."""
    updates = CASES[case].settings(CONTEXT_LAYOUTS[layout]).algo.updates_per_step
    got = torch.load(root / layout / f"{case}.pt", weights_only=False)
    check_training(got, references[case], updates)


def test_checkpoint_loads_on_another_grid(root: Path) -> None:
    """Loaded weights are bit-identical, and the next update equals that of the uninterrupted run."""
    saved, following = torch.load(root / "saved" / f"{SAVER}-fp32" / "next.pt")
    loaded, resumed = torch.load(root / LOADER / f"{SAVER}-fp32.pt")
    assert saved.keys() == loaded.keys() == resumed.keys() == following.keys()
    assert all(torch.equal(saved[n], loaded[n]) for n in saved)
    for name in following:
        assert apart(resumed[name] - loaded[name], following[name] - saved[name]) <= 1e-4, name


def test_fault_on_one_rank_affects_all_ranks(root: Path) -> None:
    """A weight that changes between scoring and training ends the run; a NaN skips one update without other effects."""
    by_rank = torch.load(root / REFUSING / "refused.pt")
    assert len(by_rank) == 8 and all(len(found) == 5 and all(found.values()) for found in by_rank)
