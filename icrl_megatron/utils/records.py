"""An append-only JSONL file of finished work, so that a command that was killed does not repeat it.

The first line is {head: identity}: what decides the records. Each other line is one record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import AppendFile


class RecordFile:
    """Open it with the folder's lock held."""

    def __init__(
        self, path: Path, head: str, identity: Mapping[str, Any], add: Callable[[Any], None], one: str, changed: str
    ) -> None:
        """Reads the file, and begins it if there is none. A last line that was cut off is removed. `add` gets each
        record, and raises ValueError or the like for one that is invalid. `one` names a record in messages, and
        `changed` says how the file's records came to be: "its runs were made with".

        Raises ConfigError if the file is another one, has another identity, or cannot be read or written."""
        self.path, self._head, self._add, self._one, self._changed = path, head, add, one, changed
        line = json.dumps({head: dict(identity)})
        with disk_errors(path, f"the {one}s"):
            if path.exists():
                self._read(line)
        self._file = AppendFile(path, f"the {one}s")
        if path.stat().st_size == 0:
            self._file.write(f"{line}\n".encode())

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(f"{json.dumps(record)}\n".encode())

    def close(self) -> None:
        self._file.close()

    def _read(self, head: str) -> None:
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                if number == 1:
                    self._check_head(line, head)
                else:
                    self._add_line(line, number)
        if end < self.path.stat().st_size:
            if end == 0 and not head.encode().startswith(self.path.read_bytes()):
                raise self._other()
            with self.path.open("r+b") as file:
                file.truncate(end)

    def _check_head(self, line: bytes, head: str) -> None:
        try:
            found = json.loads(line)[self._head]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._other() from error
        expected = json.loads(head)[self._head]
        if found != expected:
            changed = sorted(_different(found, expected))
            raise ConfigError(
                f"{self.path}: {self._changed} other settings ({', '.join(changed)}): give another --out, or delete "
                "that file to play everything again"
            )

    def _add_line(self, line: bytes, number: int) -> None:
        try:
            self._add(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{self.path}, line {number}: not a {self._one} ({error}); delete that line") from error

    def _other(self) -> ConfigError:
        return ConfigError(f"{self.path}: not a file of {self._one}s; give another --out")


def _different(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    """Dotted names of what differs."""
    if found == expected:
        return
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        found, expected = ({str(i): one for i, one in enumerate(side)} for side in (found, expected))
    if not isinstance(expected, dict) or not isinstance(found, dict):
        yield name or "all"
        return
    for key in sorted({*found, *expected}):
        yield from _different(found.get(key), expected.get(key), f"{name}.{key}" if name else key)
