"""Real disks that are small, full or read-only, and processes without root permissions; skips tests if unavailable."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

NOBODY = 65534
AS_NOBODY = f"import os\nif os.getuid() == 0: os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
"""First lines of a program, after its imports: root ignores permission bits."""


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A tmpfs of this size at `folder`, which is created; skips the test if mounting is not possible."""
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    _mount("-t", "tmpfs", "-o", f"size={kib}k,mode=777", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        while os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave_kib: int = 0) -> Path:
    """Fills a small disk with one file, except for `leave_kib` KiB; returns the file."""
    found, file = os.statvfs(disk), disk / "filler"
    with suppress(OSError):  # a running process may have filled it meanwhile
        file.write_bytes(bytes(max(0, found.f_bavail * found.f_frsize - leave_kib * 1024)))
    return file


def read_only(disk: Path) -> None:
    """Makes a small disk read-only, even while a process has files open there."""
    _mount("--bind", str(disk), str(disk))
    _mount("-o", "remount,bind,ro", str(disk))


def python(program: str, *arguments: str, timeout_s: float = 120) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a Python program that is not a rank."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=env, capture_output=True, text=True, check=False, timeout=timeout_s,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
