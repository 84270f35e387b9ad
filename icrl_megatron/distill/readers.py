"""Reads trajectories from files. A format is a module and a line in FORMATS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from icrl_megatron.distill import afm, alpaca, messages, sharegpt, steps
from icrl_megatron.distill.check import check
from icrl_megatron.distill.rows import BadRowError, Fields, Row, files, rows
from icrl_megatron.distill.trajectory import Trajectory
from icrl_megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class FileFormat:
    fits: Callable[[Sequence[str]], bool]
    """Whether a file whose first row has these columns is of this format."""
    read: Callable[[Sequence[Fields], str], Trajectory]
    """The trajectory of a row (or of the rows of a run), under this task id. Raises BadRowError."""
    begins: Callable[[Fields, Fields | None], bool] = lambda fields, before: True
    """Whether a row begins a trajectory, given the row above it."""


FORMATS: dict[str, FileFormat] = {
    "openai": FileFormat(messages.fits, messages.read),
    "sharegpt": FileFormat(sharegpt.fits, sharegpt.read),
    "alpaca": FileFormat(alpaca.fits, alpaca.read),
    "afm": FileFormat(afm.fits, afm.read),
    "oagents": FileFormat(steps.fits, steps.read, steps.begins),
}


@dataclass(frozen=True)
class Read:
    """A trajectory of a file, or why there is none."""

    where: str
    """File and line."""
    trajectory: Trajectory | None
    problem: str = ""


def read(pattern: str, format: str = "") -> Iterator[Read]:
    """The trajectories of the files of a pattern, in order. `format`: a name of FORMATS; empty: by the columns of each
    file's first row.

    Raises ConfigError for a missing or damaged file, and for a format that cannot be told.
    """
    for file in files(pattern):
        yield from _of_file(file, format)


def detect(pattern: str, format: str = "") -> None:
    """Reads each file up to the first row that can be read. Raises ConfigError as `read` does."""
    for file in files(pattern):
        broken = None
        for row in rows(file):
            if not row.problem:
                _format(file, row, format)
                break
            broken = broken or row
        else:
            why = f"no row can be read ({broken.where}: {broken.problem})" if broken else "no rows in it"
            raise ConfigError(f"{file}: {why}; give a file with at least one conversation")


def _of_file(file: Path, name: str) -> Iterator[Read]:
    form: FileFormat | None = None
    held: list[Row] = []
    broken = ""  # the place of a line that may have been a row of `held`
    for row in rows(file):
        if row.problem:
            yield Read(row.where, None, row.problem)
            if form is not None and held and not form.begins({}, held[-1].fields):
                broken = broken or row.where
            continue
        form = form or _format(file, row, name)
        if held and form.begins(row.fields, held[-1].fields):
            yield _read(form, held, broken)
            held, broken = [], ""
        held.append(row)
    if form is not None and held:
        yield _read(form, held, broken)


def _read(form: FileFormat, held: Sequence[Row], broken: str) -> Read:
    where = held[0].where
    if broken:
        return Read(where, None, f"a step of this run may be missing, because {broken} is broken; correct that line")
    try:
        found = form.read([row.fields for row in held], f"{held[0].file.stem}/{held[0].number}")
        check(found)
        return Read(where, found)
    except BadRowError as error:
        return Read(where, None, str(error))
    except KeyError as error:
        return Read(where, None, f"no column {error}; add it, or name the format of the file")
    except RecursionError:
        return Read(where, None, "values that are nested too deeply; flatten them")
    except (TypeError, ValueError, AttributeError) as error:  # a value of a type that no reader expects
        return Read(where, None, f"a value that does not fit the format ({error}); correct it")


def _format(file: Path, row: Row, name: str) -> FileFormat:
    if name:
        return FORMATS[name]
    columns = list(row.fields)
    fitting = [known for known, form in FORMATS.items() if form.fits(columns)]
    if len(fitting) != 1:
        shown = ", ".join(columns)[:300] or "none"
        which = f"could be {' or '.join(fitting)}" if fitting else "are those of no known format"
        raise ConfigError(
            f"{row.where}: the columns ({shown}) {which}; set the format of this entry of warm_start.data to one of "
            f"{', '.join(FORMATS)}"
        )
    return FORMATS[fitting[0]]
