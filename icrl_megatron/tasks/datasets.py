"""Problems from rows of files (dataset_files.py, columns.py). Every error names file and line.

A row has a prompt and a label. The prompt is text, or a list of chat messages by system and user; what the system
says stays apart from it, unless `data.system=join`. The label is text, a
number, a list (of equally good answers, or of test cases), or an object (of test cases). Lists and objects stay JSON.
With `data.shape`, rows have the columns of a published question set instead (row_shapes.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icrl_megatron.settings.task_sections import Rows, TrainAndHeldout
from icrl_megatron.tasks import columns, program_rows
from icrl_megatron.tasks.base import Opening
from icrl_megatron.tasks.dataset_files import files_of, rows_of, subset_names
from icrl_megatron.tasks.row_shapes import Shaped, Unusable, WrongRow
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

REPEATED = "it repeats the prompt of an earlier row"


@dataclass(frozen=True)
class DataRow:
    file: Path
    number: int
    """Line of a JSONL file, or row of another file; counted from 1."""
    subset: str
    """The name under which results are reported: that of the file or folder in the settings."""
    prompt: str
    label: str
    columns: columns.Columns | None = None
    """Where prompt and label come from; None for rows with a shape."""
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """All of its columns."""
    system: str = ""
    """The system message in front of the prompt; empty: none."""

    def problem(self, **more: object) -> str:
        """`Task.problem` of the row: its prompt, what `more` names, and its place."""
        system = {"system": self.system} if self.system else {}
        return json.dumps({"prompt": self.prompt, **system, **more, "where": self.where}, ensure_ascii=False)

    def content(self) -> str:
        """What the row asks."""
        return Opening(self.prompt, self.system).joined()

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.number}"


def entries_of(name: str, data: TrainAndHeldout, split: Split, what: str, remedy: str, example: str) -> list[str]:
    """The entries of `data.train` or `data.heldout`. Raises ConfigError if there are none. The message says `what` they
    name, a `remedy` and an `example`."""
    if not data.of(split):
        raise ConfigError(
            f"task set {name!r} has no {split} {what}: {remedy}, e.g. 'tasks.sources[...].data.{split}=[{example}]'"
        )
    return data.of(split)


def read_tasks(name: str, split: Split, data: Rows, problem: Callable[[DataRow], str]) -> list[Task]:
    """The tasks of one split, in the order of the files. `problem` turns a row into `Task.problem`, and raises
    ConfigError on an invalid row. Raises ConfigError if the settings name no file for the split."""
    entries_of(name, data, split, "rows", "name a JSONL or Parquet file or a folder of a Hugging Face dataset", "FILE")
    tasks: list[Task] = []
    first: dict[str, str] = {}
    repeated: list[str] = []
    for place, row in _placed(split, data):  # one at a time, because other columns may be large
        tasks.append(Task(f"{name}/{place}", name, split, problem(row)))
        if (twin := first.setdefault(content_hash(row.content()), row.where)) != row.where:
            repeated.append(f"{row.where}: the same prompt as {twin}")
    if repeated:
        raise ConfigError(
            f"{repeated[0]}, and {len(repeated)} rows in all repeat an earlier one; a duplicate counts twice: delete "
            "them, or give 'tasks.sources[...].data.duplicates=drop'"
        )
    return tasks


def chosen_rows(data: Rows, task_ids: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """The training rows of these tasks, with all of their columns. Raises ConfigError as `read_rows` does."""
    places = {task_id.partition("/")[2] for task_id in task_ids}  # without the name of the task set
    return (row.fields for place, row in _placed("train", data) if place in places)


def row_hash(task: Task) -> str:
    """A hash of a row's problem and label, wherever its file is."""
    problem = {name: value for name, value in json.loads(task.problem).items() if name != "where"}
    return content_hash(json.dumps(problem, sort_keys=True))


def _placed(split: Split, data: Rows) -> Iterator[tuple[str, DataRow]]:
    """(task id without the name of the task set, row) of one split, in the order of the files."""
    counts: Counter[str] = Counter()
    for row in _read(split, data, data.of(split)):
        yield f"{split}/{row.subset}/{counts[row.subset]}", row
        counts[row.subset] += 1


def subset_of(task: Task) -> str:
    """The task set and, if its problems have several sources, the source."""
    return task.task_id.rsplit("/", 1)[0].replace(f"/{task.split}", "", 1)


def read_rows(entry: str, data: Rows, split: Split = "train") -> Iterator[DataRow]:
    """Rows of one entry of the settings. Raises ConfigError on a missing, empty or unreadable file, a missing
    column, an empty prompt or label, and a row that cannot be asked, unless `data.unusable` drops it."""
    return _read(split, data, [entry])


def left_out(split: Split, data: Rows) -> Counter[str]:
    """Reason -> number of the rows that `data.unusable=drop` and `data.duplicates=drop` leave out."""
    why: Counter[str] = Counter()
    if (data.shape and data.unusable == "drop") or data.duplicates == "drop":
        for _ in _read(split, data, data.of(split), why):
            pass
    return why


def recognized(split: Split, data: Rows) -> list[str]:
    """A line for each file whose columns were not set, and are not the defaults."""
    lines = []
    for entry in data.of(split) if not data.shape else ():
        for file in files_of(entry, split=split) if id_range(entry) is None else ():
            number, fields = next(rows_of(file), (0, {}))
            found = _recognized(fields, data, split, f"{file}, line {number}")
            if isinstance(found, str) or found.recognized:
                lines.append(f"{file}: {f'rows of {found}' if isinstance(found, str) else found.described()}")
    return lines


def _read(split: Split, data: Rows, names: Sequence[str], dropped: Counter[str] | None = None) -> Iterator[DataRow]:
    """Counts the rows that are left out in `dropped`."""
    of_columns = ("prompt_column", "label_column", "heldout_prompt_column", "heldout_label_column", "system")
    if data.shape and any(getattr(data, name) != getattr(Rows, name) for name in of_columns):
        raise ConfigError(
            f"data.prompt_column, data.label_column, those of held-out rows and data.system have no effect with "
            f"data.shape={data.shape}: leave them out"
        )
    seen: set[str] = set()
    for entry, subset in zip(names, subset_names(names), strict=True):
        found = 0
        for file in files_of(entry, split=split):
            for row in _rows_of_file(file, split, data, subset, dropped):
                found += 1
                if data.duplicates == "drop":
                    key = content_hash(row.content())
                    if key in seen:
                        if dropped is not None:
                            dropped[REPEATED] += 1
                        continue
                    seen.add(key)
                yield row
        if not found:
            raise ConfigError(f"{entry}: no rows in it; give a file with at least one problem")


def _rows_of_file(file: Path, split: Split, data: Rows, subset: str, dropped: Counter[str] | None) -> Iterator[DataRow]:
    of_file: columns.Columns | str = data.shape
    for number, fields in rows_of(file):
        where = f"{file}, line {number}"
        of_file = of_file or _recognized(fields, data, split, where)
        try:
            shaped = _shaped(fields, split, of_file, where, data)
        except Unusable as reason:
            if data.unusable == "error":
                raise ConfigError(
                    f"{where}: {reason}; delete the row, or give 'tasks.sources[...].data.unusable=drop'"
                ) from reason
            if dropped is not None:
                dropped[str(reason)] += 1
            continue
        parts = [subset, shaped.subset]
        if data.subset_column:
            parts.append(columns.subset(fields, data.subset_column, where))
        name = "_".join(part for part in parts if part)
        used = of_file if isinstance(of_file, columns.Columns) else None
        yield DataRow(file, number, name, shaped.prompt, shaped.label, used, fields, shaped.system)


def _recognized(fields: dict[str, Any], data: Rows, split: Split, where: str) -> columns.Columns | str:
    """The columns of a file without data.shape, or the shape that its columns show."""
    set_columns = (data.prompt_column, data.label_column) != (Rows.prompt_column, Rows.label_column)
    if not set_columns and Rows.label_column not in fields and (shape := program_rows.recognized(fields)):
        return shape
    return columns.columns_of(fields, data, split, where)


def _shaped(fields: dict[str, Any], split: Split, of_file: columns.Columns | str, where: str, data: Rows) -> Shaped:
    """Raises Unusable, and ConfigError on another shape."""
    if isinstance(of_file, columns.Columns):
        found = columns.texts(fields, of_file, where, split, data.system == "join")
        return Shaped(found.prompt, found.label, system=found.system)
    try:
        shaped = program_rows.SHAPES[of_file](fields)
    except WrongRow as error:
        raise ConfigError(
            f"{where}: not a row of data.shape={of_file}: {error}; give another shape, or correct the row"
        ) from error
    if not shaped.prompt.strip() or not shaped.label.strip():
        raise ConfigError(f"{where}: its question or its answer is empty; fix or delete the row")
    return shaped


def content_hash(text: str) -> str:
    """A hash that ignores case and white space."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(errors="replace"), digest_size=16).hexdigest()


def check_no_leak(train: Iterable[Task], heldout: Iterable[Task]) -> None:
    """Raises ConfigError if a held-out problem has the same content as a training problem, in whatever files they
    are."""
    trained = {content_hash(asked(task)): task for task in train}
    leaked = [(task, trained[key]) for task in heldout if (key := content_hash(asked(task))) in trained]
    if leaked:
        task, twin = leaked[0]
        raise ConfigError(
            f"{len(leaked)} held-out problems are training problems too, first {task.task_id} (the same text as "
            f"{twin.task_id}): an evaluation on training rows measures memory; take them out of one of the files"
        )


def asked(task: Task) -> str:
    """The prompt without its label: a copy with another label is a leak too."""
    if task.problem.startswith("{"):
        try:
            problem = json.loads(task.problem)
            return f"{task.source}:{Opening(problem['prompt'], problem.get('system', '')).joined()}"
        except (ValueError, KeyError, TypeError):
            pass
    return f"{task.source}:{task.problem}"


def id_range(text: str) -> range | None:
    """`0:2420` as a range of task ids; None if it is not a range. Raises ConfigError on an empty range."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        return None
    ids = range(int(match[1]), int(match[2]))
    if not ids:
        raise ConfigError(f"{text!r} is an empty range of task ids; write first:last+1, e.g. 0:2420")
    return ids
