"""Makes result folders and what somebody may have put in their place."""

from __future__ import annotations

from pathlib import Path

from icrl_megatron.utils import results


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: what links lead to, contents of files, "/" for folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = f"-> {path.readlink()}" if path.is_symlink() else "/" if path.is_dir() else path.read_text()
    return found


def write(target: Path, kind: results.Kind, text: str = "new", **options: bool) -> Path:
    with results.writing(target, kind, **options) as folder:
        put(folder / "a.json", text)
        put(folder / "inner" / "b.txt", text)
    return target


def put(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def link(path: Path, to: str | Path) -> Path:
    path.symlink_to(to)
    return path
