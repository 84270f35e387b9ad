"""The folders `kernels/` and `recipes/` are not importable under these names, even from the repository's root."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import python

ROOT = Path(__file__).resolve().parents[2]

HUB = """
def marker():
    return "hub"
"""

PROBE = """
import importlib, json, sys
from transformers.utils.import_utils import _is_package_available, is_kernels_available
import transformers.integrations.hub_kernels
loaded = sys.modules.get("kernels")
seen = {"available": is_kernels_available(), "package": _is_package_available("kernels", return_version=True)[0]}
for name in ("kernels", "recipes"):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        seen[name] = None
    else:
        seen[name] = module.marker() if hasattr(module, "marker") else module.__file__
print(json.dumps(seen))
"""


def probe(*paths: Path) -> dict[str, object]:
    """Results of importing the two names in a new interpreter, whose path starts with the repository's root."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = python("-c", PROBE, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("folder", ["kernels", "recipes"])
def test_the_folders_are_not_packages(folder: str) -> None:
    assert (ROOT / folder / f"icrl_{folder}" / "__init__.py").is_file()
    assert not (ROOT / folder / "__init__.py").exists()


def test_transformers_does_not_mistake_our_folder_for_the_hub_package() -> None:
    if probe_installed():
        pytest.skip("the hub package is installed here: the next test covers it")
    seen = probe()
    assert seen["available"] is False and seen["package"] is False
    assert seen["kernels"] is None and seen["recipes"] is None  # a namespace package has no file


def test_installed_packages_with_these_names_are_imported(tmp_path: Path) -> None:
    for name in ("kernels", "recipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(HUB)
    seen = probe(tmp_path)
    assert seen["kernels"] == seen["recipes"] == "hub"


def probe_installed() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version("kernels"))
    except PackageNotFoundError:
        return False
