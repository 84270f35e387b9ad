"""The image's versions are the tested ones: docker/Dockerfile and docker/constraints.txt agree with the code and with
pip's own files. No image is built here (docs/LOG.md says how one was)."""

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


def test_sglang_is_the_tested_one() -> None:
    engine = [Requirement(r) for r in PROJECT["optional-dependencies"]["engine"]]
    assert TESTED[-1] == ARGS["SGLANG"] == IMAGE["sglang"] == pins("tests/engine/requirements.txt")["sglang"]
    assert [(r.name, str(r.specifier)) for r in engine] == [("sglang", f"=={TESTED[-1]}")]


def test_megatron_is_the_tested_one() -> None:
    assert ARGS["MEGATRON_CORE"] == IMAGE["megatron-core"] == pins("constraints.txt")["megatron-core"]


def test_what_sglang_pins_is_what_the_engine_tests_run_with() -> None:
    tested = pins("tests/engine/requirements.txt")
    for name in ("transformers", "tokenizers", "xgrammar", "compressed-tensors", "apache-tvm-ffi"):
        assert IMAGE[name] == tested[name], name


def test_the_dockerfile_and_its_constraints_agree() -> None:
    for name in ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"):
        assert IMAGE[name] == ARGS["TRANSFORMER_ENGINE"], name
    # torch comes first, by itself, and what belongs to it may be the base image's.
    assert not {"torch", "triton", "cuda-toolkit", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} & set(
        IMAGE
    )


@pytest.mark.parametrize("line", PROJECT["dependencies"] + PROJECT["optional-dependencies"]["gpu"])
def test_the_image_has_what_the_project_asks_for(line: str) -> None:
    wanted = Requirement(line)
    version = {**IMAGE, "torch": ARGS["TORCH"]}[canonicalize_name(wanted.name)]
    assert version in wanted.specifier
