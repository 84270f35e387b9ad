"""`make` takes a supported Python, or says in a sentence which one it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "find_python.sh"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The only folder of the PATH."""
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    return tmp_path


def program(folder: Path, name: str, lines: str) -> Path:
    path = folder / name
    path.write_text(f"#!{folder / 'bash'}\n{lines}\n")
    path.chmod(0o755)
    return path


def python(folder: Path, name: str, version: str, venv: bool = True) -> Path:
    """An interpreter of this version: it answers the two questions of the script."""
    answer = f'[[ "$2" == *venv* ]] && exit {0 if venv else 1}'
    return program(folder, name, f"{answer}\necho {version}")


def find(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [folder / "bash", SCRIPT, *arguments]
    env = {**os.environ, "PATH": str(folder)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("version", ["3.11.2", "3.12.1", "3.13.0"])
def test_a_supported_python3_is_taken(folder: Path, version: str) -> None:
    expected = python(folder, "python3", version)
    python(folder, "python3.13", "3.13.1")
    assert find(folder).stdout == f"{expected}\n"


def test_an_older_one_is_taken_beside_a_newer_python3(folder: Path) -> None:
    python(folder, "python3", "3.14.0")
    program(folder, "python3.13", "exit 127")  # a version manager's shim with nothing behind it
    python(folder, "python3.12", "3.12.3", venv=False)
    expected = python(folder, "python3.11", "3.11.9")
    assert find(folder).stdout == f"{expected}\n"
    assert find(folder, "python3.11").stdout == f"{expected}\n"


@pytest.mark.parametrize(
    ("version", "venv", "arguments", "said"),
    [
        ("3.14.0", True, [], "python3 is 3.14.0"),
        ("3.10.4", True, ["python3"], "python3 is 3.10.4"),
        ("3.12.3", False, [], "python3 (3.12.3) has no venv module: sudo apt-get install -y python3.12-venv"),
        ("3.12.3", True, ["python3.11"], "there is no python3.11 here"),
    ],
)
def test_otherwise_it_says_its_needs(folder: Path, version: str, venv: bool, arguments: list[str], said: str) -> None:
    python(folder, "python3", version, venv)
    done = find(folder, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith(f"error: Python 3.11, 3.12 or 3.13 is needed; {said}.") and "make PYTHON=" in done.stderr
    )


def test_uv_fetches_one(folder: Path) -> None:
    python(folder, "python3", "3.14.0")
    program(folder, "uv", '[ "$2" = find ] && echo /fetched/python3.13\nexit 0')
    done = find(folder)
    assert done.stdout == "/fetched/python3.13\n" and "python3 is 3.14.0; uv fetches Python 3.13" in done.stderr
