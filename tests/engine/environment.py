"""Makes the environment that runs the real SGLang on a CPU, once: `python tests/engine/environment.py`.

Prints the path of its interpreter. Where it cannot be made, says why on stderr and exits with 3. It is kept under
$ICRL_ENGINE_CACHE, or the user's cache folder, by the contents of requirements.txt and stubs/. PIP_ARGS reaches pip.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn, TextIO

HERE = Path(__file__).resolve().parent
REQUIREMENTS, STUBS = HERE / "requirements.txt", HERE / "stubs"
CANNOT = 3
PYTHON = (3, 11)
NEEDED_GIB = 5.0
TIMEOUT_S = 1800.0
READY = ".ready"


def cache() -> Path:
    """The folder of this environment: another one as soon as what it is made from changes."""
    parts = [REQUIREMENTS, *sorted(p for p in STUBS.rglob("*.py"))]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()[:12]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("ICRL_ENGINE_CACHE") or Path(base) / "icrl-megatron")
    return root / f"engine-{digest}"


def reason_against(root: Path) -> str:
    """Why it cannot be made on this machine; empty when nothing speaks against it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the pinned wheels are for Linux on x86_64, this is {sys.platform} on {platform.machine()}"
    if sys.version_info[:2] != PYTHON:
        return f"the pinned wheels are for Python {PYTHON[0]}.{PYTHON[1]}, this is {platform.python_version()}"
    free = shutil.disk_usage(root).free / 2**30
    if free < NEEDED_GIB:
        return f"{root} has {free:.1f} GiB free, it takes {NEEDED_GIB:g}"
    return ""


def make(folder: Path) -> None:
    """A virtual environment of exact versions, without a resolver: SGLang's own metadata asks for another torch."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    run(*install, *shlex.split(os.environ.get("PIP_ARGS", "")), "-r", str(REQUIREMENTS))
    for stub in STUBS.iterdir():
        shutil.copytree(stub, site_packages(folder) / stub.name, dirs_exist_ok=True)
    run(str(python), "-c", "import sglang, torch, transformers")
    # A server that may write no bytecode (PYTHONDONTWRITEBYTECODE) would compile thousands of files at each start. Some
    # packages hold files that are no Python of this version, which fail here and are never imported.
    subprocess.run(
        [str(python), "-m", "compileall", "-qq", "-j", "0", str(folder / "lib")], timeout=TIMEOUT_S, check=False
    )
    (folder / READY).touch()


def wait_for(lock: TextIO) -> None:
    """Takes the lock, which another process that makes the same environment may hold for as long as that takes."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                give_up(f"another process has held {lock.name} for {TIMEOUT_S:g} s; end it")
            time.sleep(1.0)


def site_packages(folder: Path) -> Path:
    return next((folder / "lib").glob("python3.*")) / "site-packages"


def run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        give_up(f"{' '.join(command[:6])} took longer than {TIMEOUT_S:g} s")
    if done.returncode != 0:
        give_up(f"{' '.join(command[:6])} failed:\n{(done.stderr or done.stdout)[-1500:]}")


def give_up(reason: str) -> NoReturn:
    print(f"the engine's environment cannot be made: {reason}", file=sys.stderr)
    sys.exit(CANNOT)


def main() -> None:
    folder = cache()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        wait_for(lock)
        if not (folder / READY).exists():
            if against := reason_against(folder.parent):
                give_up(against)
            print(f"making the engine's environment in {folder} (some minutes, about 2 GB)", file=sys.stderr)
            make(folder)
    print(folder / "bin" / "python")


if __name__ == "__main__":
    main()
