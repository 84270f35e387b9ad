"""The files of dumped episodes: rollouts/rank_NNNNN.jsonl, one per rank that played episodes, for all steps.

A rank only appends, one whole line per episode, so a crash loses no line that was written, and there are never more
files than ranks. Each line begins with its length and its step, so that a reader finds a step without reading the lines
of others. A last line that a crash cut off is ignored by readers and removed on resume.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError

ROLLOUTS_FOLDER = "rollouts"
_NAME = re.compile(r"rank_(\d{5,})\.jsonl")
_HEAD = re.compile(rb'\{"bytes": *(\d{1,12}), "step": *(\d{1,9}), ')
_HEAD_BYTES = 64
_BEGIN = b'{"bytes":'


@dataclass(frozen=True)
class _Line:
    begin: int
    end: int
    step: int


def shard_path(run_dir: Path, rank: int) -> Path:
    return run_dir / ROLLOUTS_FOLDER / f"rank_{rank:05d}.jsonl"


def line_of(step: int, fields: str) -> bytes:
    """A line with its head. `fields` is a JSON object that is not empty."""
    rest = f'"step": {step}, {fields[1:]}\n'.encode()
    head = b'{"bytes": %12d, '
    return head % (len(head % 0) + len(rest)) + rest


class Shards:
    """Where the lines of each step are."""

    def __init__(self, run_dir: Path) -> None:
        """Raises ConfigError on a shard that cannot be read."""
        self._places: dict[int, list[tuple[Path, int, int]]] = {}
        for _, path in _shards(run_dir):
            with _opened(path) as file:
                for line in _lines(file, path):
                    self._add(line, path)

    @property
    def steps(self) -> list[int]:
        return sorted(self._places)

    def lines(self, step: int) -> Iterator[tuple[Path, int, bytes]]:
        """File, offset and text of each line of a step. Raises ConfigError on a shard that cannot be read."""
        for path, begin, end in self._places.get(step, ()):
            with _opened(path) as file:
                file.seek(begin)
                while begin < end and (line := file.readline()):
                    yield path, begin, line
                    begin += len(line)

    def _add(self, line: _Line, path: Path) -> None:
        places = self._places.setdefault(line.step, [])
        if places and places[-1][0] == path and places[-1][2] == line.begin:
            places[-1] = (path, places[-1][1], line.end)
        else:
            places.append((path, line.begin, line.end))


def cut(run_dir: Path, step: int, rank: int, world: int) -> None:
    """Removes the episodes after `step`, and last lines that were cut off, before a run continues from there. Every
    rank calls it, and each does a part of the shards, of which an earlier grid may have left more.

    Raises ConfigError on a file that is not a shard, which stays as it is, and on disk errors.
    """
    for number, path in _shards(run_dir):
        if number % world != rank:
            continue
        with _opened(path) as file:
            lines = list(_lines(file, path))
        kept = itertools.takewhile(lambda line: line.step <= step, lines)
        end = max((line.end for line in kept), default=0)
        if end < path.stat().st_size:
            with disk_errors(path, "the rollouts"), path.open("r+b") as file:
                file.truncate(end)


def _shards(run_dir: Path) -> list[tuple[int, Path]]:
    folder = run_dir / ROLLOUTS_FOLDER
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("rank_*.jsonl"))
    return sorted((int(match[1]), path) for match, path in found if match is not None)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); make the file readable") from error


def _lines(file: IO[bytes], path: Path) -> Iterator[_Line]:
    """The whole lines of a shard. Raises ConfigError if it has any other content."""
    begin, size = 0, os.fstat(file.fileno()).st_size
    while begin < size:
        head = os.pread(file.fileno(), _HEAD_BYTES, begin)
        found = _HEAD.match(head)
        known = head.rstrip(b"\0")  # after a power failure, what was not written may be zeros
        if not (known.startswith(_BEGIN) or _BEGIN.startswith(known)):
            raise _foreign(path, begin)
        end = begin + int(found[1]) if found is not None else size
        if os.pread(file.fileno(), 1, end - 1) != b"\n" or found is None:
            file.seek(begin)  # cut off, or someone changed the line, so that its length is wrong
            line = file.readline()
            if not line.endswith(b"\n"):
                return
            if found is None:
                raise _foreign(path, begin)
            end = begin + len(line)
        yield _Line(begin, end, int(found[2]))
        begin = end


def _foreign(path: Path, offset: int) -> ConfigError:
    return ConfigError(
        f"{path}, byte {offset}: not an episode that this version dumped; move that file away, or choose another run"
    )
