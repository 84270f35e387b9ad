"""Starts a file of this folder as several gloo ranks: FILE RANK RENDEZVOUS FOLDER."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_ranks(file: str, world: int, folder: Path, timeout_s: float, **environment: str) -> None:
    """Waits until all ranks have exited with 0. Each has one thread, `timeout_s` seconds, and the tests' sys.path."""
    path = os.pathsep.join(filter(None, sys.path))
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    ranks = [
        subprocess.Popen([sys.executable, file, str(rank), str(folder / "rendezvous"), str(folder)], env=inherited)
        for rank in range(world)
    ]
    try:
        codes = [process.wait(timeout=timeout_s) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * world
