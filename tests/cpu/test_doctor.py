"""`icrl doctor` on this machine, and on one where something is broken. In processes of its own: it imports Megatron."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

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
    command = [sys.executable, "-W", "ignore", "-c", REPORT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout, done.stderr
    checks = [doctor.Check(**check) for check in json.loads(done.stderr.splitlines()[-1])]
    return done.returncode, done.stdout, checks


def test_report_of_this_machine() -> None:
    code, printed, checks = report()
    assert code == 0, printed
    assert "ready to train on" in printed
    assert platform.python_version() in printed
    assert [check.name for check in checks if check.required] == ["python", "torch", "megatron-core", "transformers"]
    names = {check.name for check in checks}
    assert len(names) == len(checks)
    assert names >= {
        "GPU",
        "FP8",
        "transformer-engine",
        "NVIDIA Apex",
        "sglang",
        "nemo-run",
        "triton",
        "Slurm clients",
        "sandbox",
    }
    for check in checks:
        assert check.name in printed
        assert check.state in ("ok", "missing", "wrong")
        assert bool(check.remedy) == (check.state != "ok"), check
        assert check.remedy in printed  # in one piece, to be copied


def test_a_required_library_that_does_not_import_is_code_1(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('the flux library is missing')")
    code, printed, _ = report(tmp_path)
    assert code == 1
    assert "wrong (required)" in printed
    assert "the flux library is missing" in printed
    assert "not ready: transformers" in printed


def test_the_other_package_called_apex_is_told_from_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if doctor._apex().state == "ok":
        pytest.skip("NVIDIA's is installed here")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor._apex()
    assert found.state == "wrong"
    assert "is not NVIDIA's" in found.found
    assert found.remedy == "pip uninstall apex"


def test_megatron_is_judged_by_what_training_imports_of_it(tmp_path: Path) -> None:
    """`import megatron.core` alone said ok where no layer could be imported."""
    (tmp_path / "flash_attn_3.py").write_text("raise OSError('libcudart.so.99 is missing')")
    code, printed, _ = report(tmp_path)
    assert code == 1
    assert "libcudart.so.99 is missing" in printed and "not ready: megatron-core" in printed
