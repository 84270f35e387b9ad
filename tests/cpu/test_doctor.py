"""`icrl doctor` on this machine, and with broken packages. In separate processes: it imports Megatron."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
from commands import python

from icrl_megatron.launch import doctor

REPORT = """
import dataclasses, json, sys
from icrl_megatron.launch import doctor
code = doctor.report()
print(json.dumps([dataclasses.asdict(check) for check in doctor.run_checks()]), file=sys.stderr)
sys.exit(code)
"""


def report(path: Path | None = None) -> tuple[int, str, list[doctor.Check]]:
    """Exit code, what is printed and the checks, with `path` in front of the module search path."""
    env = {**os.environ, "PYTHONPATH": str(path or ""), "COLUMNS": "200"}
    done = python("-W", "ignore", "-c", REPORT, env=env)
    assert done.stdout, done.stderr
    checks = [doctor.Check(**check) for check in json.loads(done.stderr.splitlines()[-1])]
    return done.returncode, done.stdout, checks


def test_report_of_this_machine() -> None:
    code, printed, checks = report()
    assert code == 0 and "ready to train on" in printed, printed
    assert platform.python_version() in printed
    assert [check.name for check in checks if check.required] == ["python", "torch", "megatron-core", "transformers"]
    names = {check.name for check in checks}
    assert len(names) == len(checks)
    assert names >= {"GPU", "FP8", "transformer-engine", "NVIDIA Apex", "sglang", "nemo-run", "triton"}
    assert names >= {"Slurm clients", "sandbox"}
    for check in checks:
        assert check.name in printed
        assert check.state in ("ok", "missing", "wrong")
        assert bool(check.remedy) == (check.state != "ok"), check
        assert check.remedy in printed  # on one line, so that it can be copied


def test_if_a_required_library_cannot_be_imported_the_exit_code_is_1(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('the flux library is missing')")
    code, printed, _ = report(tmp_path)
    assert code == 1
    assert all(s in printed for s in ("wrong (required)", "the flux library is missing", "not ready: transformers"))


def test_another_package_called_apex_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if doctor._apex().state == "ok":
        pytest.skip("NVIDIA's is installed here")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor._apex()
    assert (found.state, found.remedy) == ("wrong", "pip uninstall apex")
    assert "is not NVIDIA's" in found.found


def test_the_modules_of_megatron_that_training_uses_are_imported(tmp_path: Path) -> None:
    """`import megatron.core` can succeed although no layer can be imported."""
    (tmp_path / "flash_attn_3.py").write_text("raise OSError('libcudart.so.99 is missing')")
    code, printed, _ = report(tmp_path)
    assert code == 1
    assert "libcudart.so.99 is missing" in printed and "not ready: megatron-core" in printed
