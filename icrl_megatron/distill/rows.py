"""Rows of a file of conversations as JSON values: JSONL, a JSON list, Parquet or Arrow. Sizes are bounded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icrl_megatron.agents.formats import finite
from icrl_megatron.tasks.dataset_files import arrow_rows, files_of
from icrl_megatron.utils.errors import ConfigError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
SIDE_FILES = ("dataset_info.json", "dataset_infos.json", "state.json")
"""What a folder of a Hugging Face dataset holds besides rows."""
MOST_ROW_BYTES = 64 << 20
"""Of one line or row."""
MOST_LIST_BYTES = 2 << 30
"""Of a .json file, which is read as a whole."""

Fields = dict[str, Any]


class BadRowError(ValueError):
    """A row that cannot be trained on; the message says why, without the place."""


@dataclass(frozen=True)
class Row:
    file: Path
    number: int
    """Line of a JSONL file, or row of another file; counted from 1."""
    fields: Fields = field(default_factory=dict)
    problem: str = ""
    """Why the line cannot be read; empty if it was read."""

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.number}"


def files(pattern: str) -> list[Path]:
    """The files of one entry of the settings. Raises ConfigError if there is none, or one of another kind."""
    return [file for file in files_of(pattern, SUFFIXES) if file.name not in SIDE_FILES]


def rows(file: Path) -> Iterator[Row]:
    """The rows of a file. Raises ConfigError if the file as a whole cannot be read."""
    try:
        if file.suffix == ".jsonl":
            yield from _lines(file)
        elif file.suffix == ".json":
            yield from _list(file)
        else:
            for number, fields in enumerate(arrow_rows(file), start=1):
                yield _row(file, number, without_nulls(fields))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error}); give a whole file that you may read") from error


def parsed(text: str | bytes, what: str = "") -> Any:
    """The value of a JSON text. Raises BadRowError, which begins with `what`, also for NaN, a number that is too
    large, a name that an object has twice, and nesting that is too deep."""
    named = f"{what}: " if what else ""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=finite, object_pairs_hook=_unique)
    except RecursionError as error:
        raise BadRowError(f"{named}JSON that is nested too deeply") from error
    except ValueError as error:  # a UnicodeDecodeError too
        raise BadRowError(f"{named}broken JSON ({error})") from error


def _lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        number = 0
        while line := lines.readline(MOST_ROW_BYTES + 1):
            number += 1
            if len(line) > MOST_ROW_BYTES:
                raise ConfigError(f"{file}, line {number}: longer than {MOST_ROW_BYTES >> 20} MiB; delete the line")
            if not line.strip():
                continue
            try:
                yield _row(file, number, parsed(line))
            except BadRowError as error:
                yield Row(file, number, problem=str(error))


def _list(file: Path) -> Iterator[Row]:
    if file.stat().st_size > MOST_LIST_BYTES:
        raise ConfigError(f"{file}: longer than {MOST_LIST_BYTES >> 30} GiB; write it as JSONL, one row per line")
    try:
        found = parsed(file.read_bytes())
    except BadRowError as error:
        raise ConfigError(f"{file}: {error}; give a list of JSON objects, or JSONL") from error
    if not isinstance(found, list):
        raise ConfigError(f"{file}: not a list of JSON objects; write one, or JSONL with the suffix .jsonl")
    for number, fields in enumerate(found, start=1):
        yield _row(file, number, fields)


def _row(file: Path, number: int, fields: Any) -> Row:
    if not isinstance(fields, dict):
        return Row(file, number, problem="not a JSON object with columns")
    return Row(file, number, fields)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object has {twice[:80]!r} twice; delete one")
    return found


def without_nulls(value: Any) -> Any:
    """Arrow gives every object all fields of its column, with nulls for those that it lacks."""
    if isinstance(value, dict):
        return {name: without_nulls(of) for name, of in value.items() if of is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def text_of(value: Any, what: str) -> str:
    """A text, or the text parts of a list of parts; None is empty. Raises BadRowError for anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        return "".join(part["text"] for part in value)
    raise BadRowError(f"{what} is {str(value)[:80]!r}, not text")


def list_of(value: Any, what: str) -> list[Any]:
    """A list; None is empty. Raises BadRowError for anything else."""
    if value is None or isinstance(value, list):
        return value or []
    raise BadRowError(f"{what} is {str(value)[:80]!r}, not a list")
