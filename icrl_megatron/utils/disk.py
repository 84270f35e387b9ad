"""Free disk space and write errors, as one `ConfigError` with path, size and remedy. Imports no torch."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icrl_megatron.utils.errors import ConfigError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space there, or choose a folder on another disk"),
    errno.EDQUOT: ("your disk quota is used up", "delete files of yours there, or choose a folder on another disk"),
    errno.EROFS: ("the file system is read-only", "mount it for writing, or choose a folder on another disk"),
    errno.EACCES: ("permission denied", "change the permissions, or choose a folder that you may write to"),
    errno.EPERM: ("operation not permitted", "change owner or attributes, or choose a folder that you may write to"),
    errno.EFBIG: ("the file would exceed a size limit", "raise `ulimit -f`, or choose a folder on another disk"),
    errno.EIO: ("input/output error of the disk", "check the disk (`dmesg`), or choose a folder on another disk"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another folder"),
    errno.EISDIR: ("a folder is in the place of the file", "move that folder away, or choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter path"),
    errno.EBUSY: ("the folder is in use by the system, as a mount point", "choose a folder inside it"),
    errno.EXDEV: ("the folder cannot be renamed, it belongs to a layer of the container", "choose another folder"),
    errno.ELOOP: ("the path goes through too many symbolic links", "choose another folder"),
}
_SHORT_WRITE = re.compile(r"unexpected pos|PytorchStreamWriter failed|file write failed|requested and \d+ written")
"""torch and NumPy report a short write without its cause, which is a full disk or an exhausted quota."""


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write at `path`, which need not exist: the nearest existing folder decides."""
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ConfigError if fewer than `needed_bytes` are free at `folder`, which need not exist.

    `what` names the data to be written, e.g. "the checkpoint of step 20".
    """
    with disk_errors(folder, what):
        free = free_bytes(folder)
    if free < needed_bytes:
        raise ConfigError(
            f"{folder}: not enough disk space for {what}: it needs {size_text(needed_bytes)}, {size_text(free)} are "
            "free; free some space there, or choose a folder on another disk"
        )


@contextmanager
def disk_errors(folder: Path, what: str) -> Iterator[None]:
    """Turns errors from writing `what` to `folder` (or to a file) into one ConfigError with path, reason and remedy.

    Handles OSError (disk full, quota, read-only, permission and the other codes in `_REASONS`) and what safetensors,
    torch, torch.distributed.checkpoint and NumPy raise instead. Put the size into `what` if it is known: "the export
    (12.3 GiB)". All other errors pass through unchanged, including those of connections.
    """
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        code = _error_number(error)
        if code is None:
            raise
        reason, remedy = _REASONS[code]
        if code in _NO_ROOM:
            reason += _free_text(folder)
        raise ConfigError(f"{folder}: cannot write {what}: {reason}; {remedy}") from error


@contextmanager
def unexplained_errors() -> Iterator[None]:
    """For a program's entry point: an uncaught disk error becomes a ConfigError with the file that the OS names. Errors
    of processes and connections, and errors without a known remedy, pass through."""
    try:
        yield
    except OSError as error:
        named = error.filename is not None or error.errno in (*_NO_ROOM, errno.EROFS)
        if error.errno not in _REASONS or not named:
            raise
        reason, remedy = _REASONS[error.errno]
        raise ConfigError(f"{error.filename or 'a file that the program writes'}: {reason}; {remedy}") from error


def size_text(size: int) -> str:
    """`size` bytes as text: in GiB, or in KiB below 1 MiB."""
    if size < 1 << 20:
        return f"{size / 2**10:.1f} KiB"
    gib = size / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib:.2g} GiB"


def _free_text(folder: Path) -> str:
    try:
        return f" ({size_text(free_bytes(folder))} free)"
    except OSError:
        return ""


def _error_number(error: BaseException) -> int | None:
    """The errno behind an exception, if it is one of `_REASONS`."""
    if type(error).__name__ == "CheckpointException":  # torch's: holds each rank's error and its trace
        codes = (_error_number(failed) for failed, _ in error.failures.values())  # type: ignore[attr-defined]
        return next((code for code in codes if code is not None), None)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _REASONS else None
    if not isinstance(error, OSError | RuntimeError) and type(error).__name__ != "SafetensorError":
        return None
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)", text):  # safetensors
        return int(found[1]) if int(found[1]) in _REASONS else None
    if found := re.search(r"strerror: (.*)", text):  # torch
        return next((code for code in _REASONS if os.strerror(code) == found[1].strip()), None)
    if _SHORT_WRITE.search(text):
        return (_error_number(error.__context__) if error.__context__ else None) or errno.ENOSPC
    return None
