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
    assert names >= {"Slurm clients", "sandbox", "GPU driver", "CUDA toolkit", "C++ compiler"}
    for check in checks:
        assert check.name in printed
        assert check.state in ("ok", "missing", "wrong")
        assert bool(check.remedy) == (check.state != "ok"), check
        assert check.remedy in printed  # on one line, so that it can be copied


CLOSED, OPEN = (
    f"NVRM version: NVIDIA UNIX {name}  {{}}  Release Build\nGCC version:  gcc version 13.3.0\n"
    for name in ("x86_64 Kernel Module", "Open Kernel Module for x86_64")
)


@pytest.mark.parametrize("text", [CLOSED, OPEN])
@pytest.mark.parametrize(("driver", "state"), [("580.159.04", "ok"), ("610.10", "ok"), ("575.57.08", "wrong")])
def test_the_driver_must_run_the_locked_torch(tmp_path: Path, text: str, driver: str, state: str) -> None:
    version = tmp_path / "version"
    version.write_text(text.format(driver))
    check = doctor._driver(version)
    assert (check.state, check.found) == (state, driver)
    assert ("580 or newer" in check.remedy) == (state == "wrong")
    version.write_text("no driver\n")
    assert doctor._driver(version).state == "wrong"
    assert doctor._driver(tmp_path / "absent").state == "missing"


@pytest.mark.parametrize("release", ["12.8", "13.0"])
def test_the_toolkit_must_fit_the_cuda_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    check = doctor._cuda_toolkit()
    assert f"{nvcc}, release {release}" in check.found
    if release == "12.8":
        assert check.state == "wrong" and "CUDA 13.0" in check.remedy
    elif check.state != "ok":  # no CUDA runtime on this machine's loader path
        assert "libcudart" in check.found and f"echo {tmp_path}/lib64" in check.remedy


def test_the_headers_of_python_are_needed_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
    assert doctor._compiler().state == "missing" and f"{tmp_path}/Python.h" in doctor._compiler().found
    for name in ("c++", "g++"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler().state == "ok"


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
