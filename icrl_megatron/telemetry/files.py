"""Files that are either old or new, never half written, and folders that one job owns: a run may be killed anywhen."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from icrl_megatron.config import ConfigError


def write_atomically(path: Path, lines: Iterable[str]) -> None:
    """Replaces `path` by these lines (a newline is added to each); on a crash the old content is still there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror}. Choose a run_dir on a disk with room that you may write to."
        ) from error


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Holds the lock `name` of a run folder, which is made if need be; it goes with the process, however that ends.

    Raises ConfigError when another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / name).open("w")
    except OSError as error:
        raise ConfigError(f"run_dir={folder}: {error.strerror}; choose a folder that you may write to") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"run_dir={folder}: another run writes there; wait for it, or choose another name"
            ) from error
        yield
