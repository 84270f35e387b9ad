"""Files that are either old or new, never half written: a run may be killed at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
