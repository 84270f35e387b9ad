"""The image has the tested versions: docker/Dockerfile and docker/constraints.txt agree with the code and pip's files.
No image is built here (docs/LOG.md describes how one was)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from icrl_megatron.engines.sglang_server import TESTED

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ARGS = dict(re.findall(r'^ARG (\w+)="?([^"\n]+)"?$', (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE))


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


IMAGE = pins("docker/constraints.txt")


def test_sglang_and_megatron_have_the_tested_versions() -> None:
    engine = [Requirement(r) for r in PROJECT["optional-dependencies"]["engine"]]
    assert TESTED[-1] == ARGS["SGLANG"] == IMAGE["sglang"] == pins("tests/engine/requirements.txt")["sglang"]
    assert [(r.name, str(r.specifier)) for r in engine] == [("sglang", f"=={TESTED[-1]}")]
    assert ARGS["MEGATRON_CORE"] == IMAGE["megatron-core"] == pins("constraints.txt")["megatron-core"]


def test_dependencies_of_sglang_have_the_versions_of_the_engine_tests() -> None:
    tested = pins("tests/engine/requirements.txt")
    for name in ("transformers", "tokenizers", "xgrammar", "compressed-tensors", "apache-tvm-ffi"):
        assert IMAGE[name] == tested[name], name


def test_the_dockerfile_and_its_constraints_agree() -> None:
    for name in ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"):
        assert IMAGE[name] == ARGS["TRANSFORMER_ENGINE"], name
    # torch is installed first, and its dependencies may come with the base image.
    unpinned = {"torch", "triton", "cuda-toolkit", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"}
    assert not unpinned & set(IMAGE)


@pytest.mark.parametrize("line", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["gpu"])
def test_the_image_meets_the_projects_requirements(line: str) -> None:
    wanted = Requirement(line)
    version = {**IMAGE, "torch": ARGS["TORCH"]}[canonicalize_name(wanted.name)]
    assert version in wanted.specifier
