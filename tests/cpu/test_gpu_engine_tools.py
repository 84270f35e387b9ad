"""The parts of the tools for SGLang that work without a GPU."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import sys
import time
from pathlib import Path

import pytest

from icrl_megatron.settings import loading as S

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools import each other, as scripts in one folder do."""
    monkeypatch.syspath_prepend(str(TOOLS))


def test_a_server_without_flashinfer_gets_the_needed_environment_and_arguments(tmp_path: Path) -> None:
    server = importlib.import_module("gpu_server")
    env = server.environment({"LD_LIBRARY_PATH": "/here", "CUDA_HOME": str(tmp_path)})
    assert (env["SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK"], env["CUDA_HOME"]) == ("1", str(tmp_path))
    assert env["LD_LIBRARY_PATH"].split(":") == [*server.cudart_folders(), "/here"]
    words = importlib.import_module("gpu_runs").command("engine_fp8", "cuda", 2, tmp_path, ())
    settings = S.load("rulebook_easy", words[words.index("rulebook_easy") + 1 :])
    assert settings.engine.server_args == list(server.ARGUMENTS)
    assert settings.engine.quantization == "fp8"


def test_a_run_is_killed_with_its_children_at_its_time_limit(tmp_path: Path) -> None:
    limited, mark = importlib.import_module("limited"), tmp_path / "alive"
    child = f"import time, pathlib\ntime.sleep(4)\npathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    assert limited.run([sys.executable, "-c", parent], 1.0) is None
    time.sleep(4)
    assert not mark.exists()
    assert limited.run([sys.executable, "-c", "raise SystemExit(7)"], 30.0) == 7


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    engine = importlib.import_module("gpu_engine")
    record = engine.Record(tmp_path / "engine.json", {})

    def hang() -> dict[str, float]:
        async def swallowing() -> None:
            while True:
                with contextlib.suppress(Exception):
                    await asyncio.sleep(0.01)

        asyncio.run(swallowing())
        return {}

    def fail() -> dict[str, float]:
        raise ValueError("broken")

    assert not record.run("hangs", 1, hang)
    assert not record.run("fails", 5, fail)
    assert record.run("works", 5, lambda: {"seconds": 1.0})
    found = json.loads((tmp_path / "engine.json").read_text())
    assert found["failures"]["hangs"].startswith("OutOfTimeError: took longer than 1 s")
    assert found["failures"]["fails"].startswith("ValueError: broken")
    assert found["medians"]["works"]["seconds"] == 1.0
