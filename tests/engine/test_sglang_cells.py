"""Cells of ICRL's tables start on the real SGLang: each run is trained for three steps and evaluated.

ICRL_CELLS names cells, or * for all; tests/dist/test_reproduce_starts.py does the same on the local engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_cases import engine_settings
from paper_cells import LIMIT_S, POSITIONS, World, asked_for, check_started, start, world

from icrl_megatron.engines.sglang_server import Server, ServerSpec

pytestmark = [pytest.mark.engine, pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]

FEW = ("math-icrl-8b-aime24",)
"""Without ICRL_CELLS."""
START_S = 1500
"""For a server, also on a machine that is busy with others."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[World, Server]]:
    with world(tmp_path) as here:
        settings = engine_settings(startup_timeout_s=START_S)
        spec = ServerSpec(here.model, settings, "fp32", POSITIONS, tmp_path / "sglang.log", on_cpu=True)
        server = Server(spec)
        server.start()
        try:
            server.wait_ready()
            yield here, server
        finally:
            server.kill()


def test_cells_train_and_are_read(place: tuple[World, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, server = place
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SERVER_KEY", server.key)
    remote = (f"engine.urls=[{server.url}]", "engine.api_key_env=SERVER_KEY")
    asked = here.asked(asked_for(FEW), tmp_path / "out", *remote)
    # A second model needs a server of its own.
    python = f"engine.python={os.environ['ICRL_ENGINE_PYTHON']}"
    own = ("engine.urls=[]", "engine.api_key_env=", python, f"engine.startup_timeout_s={START_S}")
    check_started(asked, start(asked, here, tmp_path, own))
    assert "Prefill batch" in (tmp_path / "sglang.log").read_text()
