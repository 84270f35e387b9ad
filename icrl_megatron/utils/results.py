"""Writes result folders: exports, imported checkpoints, evaluations, indices. Imports no torch.

A result folder gets its name when it is complete, and atomically replaces an earlier result of the same kind. Its
marker lists the written files, so that a replacement does not delete files that were added later.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from icrl_megatron import __version__
from icrl_megatron.utils.disk import disk_errors, size_text
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import locked, sync
from icrl_megatron.utils.step_names import step_name

REMEDY = "choose another folder, or give --overwrite to replace it"
MOVE_AWAY = "move it away, or choose another run_dir"
"""The remedy of commands that write a run."""
MARKER = ".icrl-result"
"""A file in each result folder: kind, version of the program, and the files that were written. transformers and SGLang
do not read a file of this name."""
CHECKPOINT_RECORD = "icrl.json"
"""A file in every complete checkpoint (`actor.checkpoint.META`)."""
FIRST_STEP = step_name(0)
_TEMPORARY = ".icrl-tmp"
_LOCK = "lock"
_OLD = "replaced"
_DIGEST_BYTES = 1 << 20
_LOOKS = 5
_YOUNG_S = 60.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Kind:
    """A kind of result folder."""

    name: str
    """Its name in the marker."""
    called: str
    """Its name in messages."""
    known: Callable[[Path], bool] = lambda folder: False
    """Whether a folder without a marker is certainly a complete result of this kind, with nothing else in it."""


def _is_evaluation(folder: Path) -> bool:
    if {path.name for path in folder.iterdir()} - {"eval.json", "eval.png", "logs", "rollouts"}:
        return False
    return {"successes", "subsets", "scores", "generated_tokens"} <= read_json(folder / "eval.json").keys()


def _is_checkpoint(folder: Path) -> bool:
    listed = read_json(folder / CHECKPOINT_RECORD).get("files")
    found = {path.relative_to(folder).as_posix() for path in _files(folder)} - {CHECKPOINT_RECORD}
    return isinstance(listed, dict) and found == listed.keys()


def _is_index(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    built = all(name in ("source.json", "offsets.npy") or ".index." in name for name in names)
    return built and read_json(folder / "source.json").keys() == {"size", "changed"}


MODEL = Kind("model", "Hugging Face export")
CHECKPOINT = Kind("checkpoint", "checkpoint", _is_checkpoint)
EVALUATION = Kind("evaluation", "evaluation", _is_evaluation)
MODEL_FILES = Kind("model files", "copy of the model's configuration and tokenizer")
INDEX = Kind("index", "search index", _is_index)


def check(
    target: Path, kind: Kind, sources: Sequence[Path] = (), overwrite: bool = False, remedy: str = REMEDY
) -> None:
    """Raises ConfigError, before any work, if `target` must not become a result folder of this kind. Changes nothing.

    A target may be absent, empty, or an earlier result of the same kind in which nothing was added or changed;
    `overwrite` allows any other folder too. Never allowed: a file, a symbolic link, a mount point, the working
    directory or home or a folder that contains them, a folder that contains one of `sources`, a checkpoint if the kind
    is another, and a folder inside another result, which would be deleted with it. `remedy` ends the message if
    `overwrite` would help.
    """
    with disk_errors(target, f"the {kind.called}"):
        _check_name(target, kind, sources)
        _check_place(target, kind)
        if target.exists() and not overwrite and (why := _not_ours(target, kind)):
            raise ConfigError(f"{target}: {why}, so the {kind.called} does not replace it; {remedy}")
        check_permission(_named(target))


@contextmanager
def writing(
    target: Path, kind: Kind, sources: Sequence[Path] = (), overwrite: bool = False, remedy: str = REMEDY
) -> Iterator[Path]:
    """Yields an empty temporary folder beside `target`, which becomes `target` when the block succeeds.

    Checks the target as `check` does, at the beginning and again before it is replaced. A block that fails, or is
    killed at any time, leaves the old result. Files get the permissions of the umask. Raises ConfigError, also on disk
    errors outside the block.
    """
    check(target, kind, sources, overwrite, remedy)
    target = _named(target)
    with ExitStack() as held:
        with disk_errors(target, f"the {kind.called}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(target)
            holder = target.with_name(f".{target.name}.{os.urandom(4).hex()}{_TEMPORARY}")
            holder.mkdir()
            held.callback(_remove, holder)
            held.enter_context(locked(holder, _LOCK))
            new = holder / target.name
            new.mkdir()
        yield new
        check(target, kind, sources, overwrite, remedy)
        with disk_errors(target, f"the {kind.called}"):
            _finish(new, kind)
            _swap(new, target, holder / _OLD)


def check_import(root: Path, source: Path, overwrite: bool = False) -> Path:
    """The target of an import into the checkpoint folder `root`: its step_000000. Other steps there are kept.

    Raises ConfigError as `check` does, and if `root` holds anything but checkpoints, unless `overwrite`.
    """
    with disk_errors(root, "the checkpoint"):
        _check_name(root, CHECKPOINT, [source])
        strangers = [p.name for p in root.iterdir() if not _belongs(p)] if root.exists() and not overwrite else []
    if strangers:
        raise ConfigError(
            f"{root}: it holds {_listed(strangers)}, so it is not a folder of checkpoints; choose another folder, or "
            "give --overwrite to write step_000000 beside that"
        )
    root = _named(root)
    check(root / FIRST_STEP, CHECKPOINT, [source], overwrite)
    return root / FIRST_STEP


def check_permission(target: Path) -> None:
    """Raises the OSError that replacing `target` would raise, by writing a file: root ignores permission bits."""
    if target.exists() and not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    parent = target.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    with tempfile.TemporaryFile(dir=parent):
        pass


def is_temporary(path: Path) -> bool:
    """Whether this is the temporary folder of a result that is being written, or that a killed process left."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def is_result(folder: Path) -> bool:
    """Whether a folder is a result of this program. Results are replaced (and checkpoints deleted) as a whole."""
    return (folder / MARKER).is_file() or (folder / CHECKPOINT_RECORD).is_file()


def read_marker(folder: Path) -> Mapping[str, object]:
    """The marker of a result folder; empty if it is missing or damaged."""
    found = read_json(folder / MARKER)
    return found if isinstance(found.get("files"), dict) and isinstance(found.get("kind"), str) else {}


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty if the file cannot be read or holds no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def describe(folder: Path) -> str:
    """Number and total size of a result's files, as text."""
    sizes = [path.stat().st_size for path in _files(folder) if path.name != MARKER]
    return f"{len(sizes)} file{'' if len(sizes) == 1 else 's'}, {size_text(sum(sizes))}"


def _named(target: Path) -> Path:
    """The same path, ending in the folder's name; "a/.." does not."""
    return Path(os.path.realpath(target)) if target.name in ("", "..") else target


def _belongs(path: Path) -> bool:
    """Whether this program writes such a path into a checkpoint folder."""
    return (path.name.startswith("step_") and path.is_dir()) or is_temporary(path) or bool(read_marker(path))


def _check_name(target: Path, kind: Kind, sources: Sequence[Path]) -> None:
    """Raises ConfigError for targets that no option allows."""
    if target.is_symlink():
        raise ConfigError(
            f"{target}: a symbolic link to {os.path.realpath(target)}, which is not replaced; name the folder, or "
            "another one"
        )
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: a file, and the {kind.called} is a folder; choose another name")
    real = Path(os.path.realpath(target))
    for what, named in (("the working directory", "."), ("your home folder", os.environ.get("HOME") or "/")):
        path = Path(os.path.realpath(named))
        if real == path or real in path.parents:
            how = "is" if real == path else "contains"
            raise ConfigError(f"{target}: {how} {what}; name a new folder for the {kind.called}")
    for source in sources:
        if any(real == path or real in path.parents for path in _places_of(source)):
            raise ConfigError(f"{target}: contains {source}, an input of this command; choose a folder outside it")


def _check_place(target: Path, kind: Kind) -> None:
    """Raises ConfigError if the folder cannot be replaced as a whole, or would be deleted with another one."""
    real = Path(os.path.realpath(target))
    if kind is not CHECKPOINT and (target / CHECKPOINT_RECORD).is_file():
        raise ConfigError(f"{target}: a checkpoint, which only a checkpoint may replace; choose another folder")
    if os.path.ismount(real):
        raise ConfigError(f"{target}: a mount point, which cannot be replaced; name a folder inside it")
    for parent in real.parents:
        if is_result(parent):
            raise ConfigError(
                f"{target}: is inside the result {parent}, and would be deleted with it; choose a folder outside it"
            )


def _places_of(source: Path) -> Iterator[Path]:
    """The paths of a source folder: its name, and the targets of its own link and of its files' links."""
    yield Path(os.path.realpath(source.parent)) / source.name
    yield Path(os.path.realpath(source))
    for path in source.iterdir() if source.is_dir() else ():
        if path.is_symlink():
            yield Path(os.path.realpath(path))


def _not_ours(target: Path, kind: Kind) -> str:
    """Why `target` is neither empty nor an unchanged result of this kind; empty text if it is one of these."""
    for _ in range(_LOOKS):
        marker = read_marker(target)
        with suppress(FileNotFoundError):  # another process is replacing the target
            why = _stranger(target, kind, marker)
            if not why or read_marker(target) == marker:
                return why
    return "another process keeps writing it"


def _stranger(target: Path, kind: Kind, marker: Mapping[str, object]) -> str:
    if not any(target.iterdir()):
        return ""
    if not marker:
        if kind.known(target):
            return ""
        names = [path.name for path in target.iterdir()]
        return f"it holds {_listed(names)}, and is not known to be an earlier {kind.called} of this program"
    if marker["kind"] != kind.name:
        return f"it is a result of another kind ({marker['kind']})"
    written = marker["files"]
    assert isinstance(written, dict)
    for path in _files(target):
        name = path.relative_to(target).as_posix()
        if name == MARKER:
            continue
        if name not in written:
            return f"{name} was added after it was written"
        if written[name] != digest(path):
            return f"{name} was changed after it was written"
    return ""


def _listed(names: Sequence[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _files(folder: Path) -> list[Path]:
    """All paths below a folder that are not folders, links included."""
    found = []
    for at, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(at) / name).is_symlink()]
        found += [Path(at) / name for name in (*names, *links)]
    return sorted(found)


def digest(path: Path) -> str:
    """Hashes size, beginning and end: weights are too large to read in full, and further training changes both ends."""
    if path.is_symlink() or not path.is_file():
        return "not a file"
    size = path.stat().st_size
    read = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        read.update(file.read(_DIGEST_BYTES))
        if size > _DIGEST_BYTES:
            file.seek(max(_DIGEST_BYTES, size - _DIGEST_BYTES))
            read.update(file.read(_DIGEST_BYTES))
    return read.hexdigest()


def folder_digest(folder: Path) -> str:
    """Hashes the files of a model's folder that decide what it replies."""
    names = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja"))
    lines = "".join(f"{path.name} {digest(path.resolve())}\n" for path in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def _finish(new: Path, kind: Kind) -> None:
    """Writes marker and permissions, and syncs everything to disk before the folder gets its name."""
    files = {path.relative_to(new).as_posix(): digest(path) for path in _files(new)}
    marker = new / MARKER
    marker.write_text(
        json.dumps({"kind": kind.name, "program": "icrl-megatron", "version": __version__, "files": files}, indent=1)
        + "\n",
        encoding="utf-8",
    )
    mode = stat.S_IMODE(marker.stat().st_mode)  # the mode of a new file under the umask or the folder's default ACL
    for path in _files(new):
        if not path.is_symlink():  # safetensors creates files as 0600, and copies keep the original's permissions
            path.chmod(mode)
            sync(path)
    for at, _, _ in os.walk(new):
        Path(at).chmod(stat.S_IMODE(new.stat().st_mode))
        sync(Path(at))


def _swap(new: Path, target: Path, aside: Path) -> None:
    """Renames `new` to `target`; an old folder there is moved to `new` or `aside`, in the same temporary folder."""
    try:
        new.rename(target)  # succeeds if the target is absent or an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchanged(new, target):
            target.rename(aside)
            try:
                new.rename(target)
            except OSError:
                aside.rename(target)
                raise
    sync(target.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two folders atomically; False if the OS or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def _remove_stale(target: Path) -> None:
    """Removes temporary folders of this target whose process has ended, and restores an old result if that process was
    killed between two renames."""
    for holder in target.parent.glob(f".{glob.escape(target.name)}.*{_TEMPORARY}"):
        with suppress(ConfigError, OSError):  # a live process has locked it, or another user owns it
            begun = {path.name for path in holder.iterdir()} - {_LOCK}
            if not begun and time.time() - holder.stat().st_mtime < _YOUNG_S:
                continue  # a process may be about to lock it
            with locked(holder, _LOCK):
                if (holder / _OLD).is_dir() and not target.exists():
                    (holder / _OLD).rename(target)
                _remove(holder)


def _remove(holder: Path) -> None:
    with suppress(OSError):  # another process is removing it too, or something in it cannot be removed
        for path in holder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path, ignore_errors=True)
        (holder / _LOCK).unlink(missing_ok=True)
        holder.rmdir()
