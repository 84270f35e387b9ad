"""The real server, started once for all tests of this folder that do not break it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import whole_runs
from engine_cases import engine_on, engine_settings, serving, tiny

from icrl_megatron.engines.sglang import SGLangEngine
from icrl_megatron.engines.sglang_server import Server

whole_runs.TIMEOUT_S = 600  # a server alone takes a minute and more to start on a busy machine


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with an untied head, the words of Rulebook and the tags of tools."""
    return tiny(tmp_path_factory.mktemp("engine") / "model", "qwen3")


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Qwen2.5."""
    return tiny(tmp_path_factory.mktemp("engine") / "qwen2", "qwen2")


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("server"), engine_settings()) as started:
        yield started


@pytest.fixture
def engine(server: Server, model: Path) -> SGLangEngine:
    return engine_on(server, model, engine_settings())
