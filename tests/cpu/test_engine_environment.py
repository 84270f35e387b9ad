"""If the engine's environment cannot be created, `make test-engine` prints the reason and skips the tests."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "engine" / "environment.py"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_environment", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("ICRL_ENGINE_CACHE", str(tmp_path))
    return module


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        ({"PYTHONS": ("2.6", "2.5")}, "Python 2.6, 2.5, this is " + platform.python_version()),
        ({"NEEDED_GIB": 1e9}, "GiB free"),
    ],
)
def test_it_prints_the_reason_and_exits_with_3(
    environment: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    needs: dict[str, object],
    reason: str,
) -> None:
    if sys.platform == "linux":
        for name, value in needs.items():
            monkeypatch.setattr(environment, name, value)
    with pytest.raises(SystemExit) as stopped:
        environment.main()
    assert stopped.value.code == environment.CANNOT == 3
    out, err = capsys.readouterr()
    assert out == "" and "the engine's environment cannot be made" in err and reason in err


def test_it_may_have_another_python(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The running Python comes first; others follow if they work: a version manager's shims may have nothing behind."""
    running = platform.python_version().rpartition(".")[0]
    shim, works = tmp_path / "python3.98", tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    works.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(environment, "PYTHONS", (running, "3.97", "3.98", "3.99"))
    assert environment.pythons() == [sys.executable, str(works)]
    monkeypatch.setattr(environment, "PYTHONS", ("3.99",))
    assert environment.pythons() == [str(works)]


def test_a_complete_environment_is_reused(environment: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    folder = environment.cache()
    folder.mkdir(parents=True)
    (folder / environment.READY).touch()
    environment.main()
    assert capsys.readouterr().out == f"{folder / 'bin' / 'python'}\n"


def test_requirements_name_its_folder(environment: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = environment.cache()
    other = tmp_path / "requirements.txt"
    other.write_text("sglang==9\n")
    monkeypatch.setattr(environment, "REQUIREMENTS", other)
    assert environment.cache() != before
