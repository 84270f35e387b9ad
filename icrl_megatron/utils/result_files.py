"""Checks for single output files whose path a user gives: a page, a picture. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.results import check_permission

_HEAD_BYTES = 4096


def check_file(target: Path, what: str, ours: Callable[[Path], bool], overwrite: bool = False) -> None:
    """Raises ConfigError, before any work, if `target` must not be written: it is a folder, a symbolic link or, without
    `overwrite`, a nonempty file that `ours` does not recognize. `what` names the file in messages."""
    with disk_errors(target, what):
        if target.is_symlink():
            raise ConfigError(f"{target}: a symbolic link, which is not replaced; name the file itself, or another one")
        if target.exists() and not target.is_file():
            raise ConfigError(f"{target}: not a file, and {what} is one; choose another name")
        if target.exists() and not overwrite and target.stat().st_size > 0 and not ours(target):
            raise ConfigError(
                f"{target}: not {what} that this program wrote, so it is not replaced; choose another file, or give "
                "--overwrite to replace it"
            )
        check_permission(target)


def begins_with(*texts: bytes) -> Callable[[Path], bool]:
    """Recognizes files by texts in their first bytes."""

    def recognise(path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        return all(text in head for text in texts)

    return recognise
