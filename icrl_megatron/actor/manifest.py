"""icrl.json, the record of a checkpoint: the run's progress, and the size and SHA-256 of every other file. No torch.

It is written last and contains a checksum of itself, so that any damaged byte of a checkpoint is detected. Everything
in a checkpoint is JSON, text or safetensors, so reading one never executes code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import digest
from icrl_megatron.utils.step_names import step_of

META = "icrl.json"
FORMAT = 2
"""1 was the format of torch.distributed.checkpoint, whose list of tensors is a pickle."""
PART = ".part"
"""Suffix of a folder that is being written or deleted."""
DAMAGED = ".damaged"
"""Suffix of a damaged checkpoint that was set aside."""
_LEFTOVER = re.compile(r"step_\d{6,}(\.\w+)?\.part")
_FIRST_FORMAT = {"step", "weight_version", "optimizer_steps", "generated_tokens"}
_NO_MEMORY = re.compile(r"allocate memory|out of memory|os error 12\b", re.IGNORECASE)


class DamagedError(Exception):
    """A file of a checkpoint provably differs from what was written. `file` is its path relative to the checkpoint."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file} {reason}")
        self.file, self.reason = file, reason


@dataclass(frozen=True)
class SavedProgress:
    """The progress of a run: everything besides tensors that the next step depends on. Random choices are functions of
    (seed, step), so they have no state to save."""

    step: int
    """Completed training steps."""
    weight_version: int
    optimizer_steps: int
    generated_tokens: int


@dataclass(frozen=True)
class FileRecord:
    """Expected size and hash of a file."""

    bytes: int
    sha256: str
    """Hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """The content of icrl.json."""

    progress: SavedProgress
    run: str
    """Identifies the run folder that the checkpoint belongs to; empty for an imported model."""
    files: Mapping[str, FileRecord]
    """By path relative to the checkpoint, with forward slashes."""


def complete(root: Path) -> list[Path]:
    """The completely written checkpoints under `root`, oldest first, without a check for damage. A folder has its final
    name only when it is complete, so one without icrl.json is listed: it is damaged."""
    found = {step: p for p in _entries(root) if (step := step_of(p.name)) is not None}
    return [p for _, p in sorted(found.items()) if p.is_dir()]


def leftovers(root: Path) -> list[Path]:
    """Folders of checkpoints that a killed process was still writing or deleting."""
    return [p for p in _entries(root) if _LEFTOVER.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]


def set_aside_name(folder: Path) -> Path:
    """The first free name of the form step_000040.damaged, step_000040.damaged2, ..."""
    number, name = 1, folder.with_name(f"{folder.name}{DAMAGED}")
    while name.exists() or name.is_symlink():
        number += 1
        name = folder.with_name(f"{folder.name}{DAMAGED}{number}")
    return name


def write(folder: Path, manifest: Manifest) -> None:
    """Writes icrl.json; raises OSError."""
    content: dict[str, Any] = {"format": FORMAT, **asdict(manifest)}
    write_file(folder / META, _text({**content, "sha256": _checksum(content)}))


def read(folder: Path) -> Manifest:
    """Raises DamagedError on proof of damage, and ConfigError if icrl.json is of another version or unreadable now."""
    with reading(folder, META):
        text = (folder / META).read_bytes()
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise TypeError("it is not a JSON object")
        _check_version(folder, content)
        if content.pop("sha256") != _checksum(content):
            raise ValueError("its checksum differs")
        if content.pop("format") != FORMAT:
            raise ConfigError(_other_version(folder, "its format differs"))
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        manifest = Manifest(SavedProgress(**content["progress"]), content["run"], files)
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(META, f"differs from what was written ({type(error).__name__}: {error})") from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConfigError(f"{folder / META}: lists {name!r}, which is outside the checkpoint; do not use it")
    return manifest


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Compares one file with its record. Raises DamagedError on proof of damage, ConfigError if it cannot be read."""
    path = folder / name
    if path.is_symlink():
        raise ConfigError(f"{path}: is a symbolic link, and a checkpoint has none; put the file itself there")
    with reading(folder, name):
        size = path.stat().st_size
        if size != record.bytes:
            raise DamagedError(name, f"has {size} bytes instead of {record.bytes}")
        found = digest(path)
    if found != record.sha256:
        raise DamagedError(name, "has a different checksum than when it was written")


def shares(files: Mapping[str, FileRecord], ranks: int) -> list[list[str]]:
    """Assigns the files to `ranks` readers with about equal bytes each; the same on every rank."""
    dealt: list[list[str]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for name in sorted(files, key=lambda n: (-files[n].bytes, n)):
        least = load.index(min(load))
        dealt[least].append(name)
        load[least] += files[name].bytes
    return dealt


def write_file(path: Path, data: bytes) -> FileRecord:
    """Writes `data` to a new file, which follows the umask and is synced to disk on return. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


@contextmanager
def reading(folder: Path, name: str) -> Iterator[None]:
    """Converts errors of reading a checkpoint's file. Raises DamagedError only if the file is missing; every other
    error does not prove damage and becomes a ConfigError."""
    try:
        yield
    except (DamagedError, ConfigError):
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give a checkpoint (step_NNNNNN)") from error
        raise DamagedError(name, "is missing") from error
    except Exception as error:
        # Python, the system, torch and safetensors each have their own error for this.
        no_memory = isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM
        if no_memory or _NO_MEMORY.search(str(error)):
            raise ConfigError(
                f"{folder / name}: not enough memory to read the checkpoint, which is not damaged ({_line(error)}); "
                "use a machine with more memory, or more ranks"
            ) from error
        if isinstance(error, OSError):
            raise ConfigError(
                f"{folder / name}: cannot be read now ({error.strerror or error}), which does not mean that the "
                "checkpoint is damaged: nothing was changed; make the file readable and run the same command again"
            ) from error
        raise


def _check_version(folder: Path, content: Mapping[str, Any]) -> None:
    """Raises ConfigError for a record of an earlier or later version, because neither is damage."""
    known = {"format", "progress", "run", "files", "sha256"}
    if content.keys() == _FIRST_FORMAT:
        raise ConfigError(
            f"{folder}: written by an earlier version of this program, in a format that is no longer read because "
            "its pickled metadata can execute code; export it with that version (`icrl export`) and begin a new run "
            "with model.path=EXPORT"
        )
    inner = content.get("progress")
    unknown = sorted(content.keys() - known)
    if isinstance(inner, dict) and inner.keys() >= _FIRST_FORMAT:
        unknown += sorted(inner.keys() - _FIRST_FORMAT)
    if unknown and content.keys() >= known:
        raise ConfigError(_other_version(folder, f"it has {', '.join(sorted(set(unknown)))}"))


def _other_version(folder: Path, why: str) -> str:
    return f"{folder / META}: written by another version of this program ({why}); use that version"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content)).hexdigest()


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode()


def _entries(root: Path) -> list[Path]:
    try:
        return list(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{root}: cannot be read ({error.strerror}); make the folder readable") from error


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
