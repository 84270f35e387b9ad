"""uv.lock has the tested versions, agrees with pyproject.toml, and names only the public index; docker/Dockerfile
agrees with the lock. No image is built here (docs/LOG.md describes how one was)."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from icrl_megatron.engines.sglang_server import TESTED

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, GROUPS = PYPROJECT["project"], PYPROJECT["dependency-groups"]
MAKEFILE, DOCKERFILE = (ROOT / "Makefile").read_text(), (ROOT / "docker" / "Dockerfile").read_text()
ARGS = dict(re.findall(r'^ARG (\w+)="?([^"\n]+)"?$', DOCKERFILE, re.MULTILINE))
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
PACKAGES: list[dict[str, Any]] = LOCK["package"]
OURS = next(package for package in PACKAGES if package["name"] == "icrl-megatron")
PYTHONS = ("3.11", "3.12", "3.13")
VERSIONS: dict[str, set[str]] = defaultdict(set)
for package in PACKAGES:
    if package is not OURS:
        VERSIONS[package["name"]].add(package["version"])


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def pinned(group: str) -> dict[str, str]:
    """What a group of pyproject.toml pins exactly."""
    found = [Requirement(line) for line in GROUPS[group]]
    return {r.name: str(r.specifier)[2:] for r in found if str(r.specifier).startswith("==")}


def test_sglang_has_the_tested_version() -> None:
    engine = [Requirement(r) for r in PROJECT["optional-dependencies"]["engine"]]
    assert TESTED[-1] == ARGS["SGLANG"] == pins("tests/engine/requirements.txt")["sglang"]
    assert [(r.name, str(r.specifier)) for r in engine] == [("sglang", f"=={TESTED[-1]}")]
    assert VERSIONS["sglang"] == {TESTED[-1]}


def test_dependencies_of_sglang_have_the_versions_of_the_engine_tests() -> None:
    tested = pins("tests/engine/requirements.txt")
    for name in ("transformers", "tokenizers", "xgrammar", "compressed-tensors", "apache-tvm-ffi"):
        assert tested[name] in VERSIONS[name], name


def test_the_dockerfile_and_the_lock_agree() -> None:
    assert pinned("cuda") == {"torch": ARGS["TORCH"], "transformer-engine": ARGS["TRANSFORMER_ENGINE"]}
    for name in ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"):
        assert VERSIONS[name] == {ARGS["TRANSFORMER_ENGINE"]}, name
    assert f"BASE ?= {ARGS['BASE']}\n" in MAKEFILE


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_has_the_newest_megatron_that_supports_it(python: str) -> None:
    lines = [line for line in OURS["dependencies"] if line["name"] == "megatron-core"]
    here = {"python_full_version": f"{python}.1", "python_version": python, "sys_platform": "linux"}
    found = [line["version"] for line in lines if Marker(line["marker"]).evaluate(here)]
    assert found == (["0.16.1"] if python == "3.11" else ["0.19.2"])


@pytest.mark.parametrize("line", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["gpu"])
def test_the_lock_meets_the_projects_requirements(line: str) -> None:
    wanted = Requirement(line)
    locked = VERSIONS[canonicalize_name(wanted.name)]
    assert locked and all(version in wanted.specifier for version in locked)


def test_the_lock_is_of_this_pyproject() -> None:
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra, lines in PROJECT["optional-dependencies"].items():
        wanted += [Requirement(f"{line.partition(';')[0]}; extra == '{extra}'") for line in lines]
    locked = OURS["metadata"]["requires-dist"]
    found = {(line["name"], Requirement(f"x{line.get('specifier', '')}").specifier) for line in locked}
    assert {(canonicalize_name(r.name), r.specifier) for r in wanted} == found
    assert set(LOCK["requires-python"].split(", ")) == set(PROJECT["requires-python"].split(","))
    assert set(OURS["metadata"]["requires-dev"]) == set(GROUPS)


def test_the_lock_names_only_the_public_index() -> None:
    for package in PACKAGES:
        if package is not OURS:
            assert package["source"] == {"registry": "https://pypi.org/simple"}, package["name"]
            for file in [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]:
                assert file["url"].startswith("https://files.pythonhosted.org/"), file
