"""Reads problems from disk: JSONL, Parquet and folders of Hugging Face datasets. Every error names file and line.

A row has a prompt and a label. The prompt is text, or a list of chat messages by system and user. The label is text, a
number, a list (of equally good answers, or of test cases), or an object (of test cases). Lists and objects stay JSON.
With `data.shape`, rows have the columns of a published question set instead (row_shapes.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icrl_megatron.settings.task_options import Rows
from icrl_megatron.tasks.row_shapes import SHAPES, Shaped, Unusable, WrongRow
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

SUFFIXES = (".jsonl", ".parquet", ".arrow")


@dataclass(frozen=True)
class DataRow:
    """One row of a file."""

    file: Path
    number: int
    """Line of a JSONL file, or row of another file; counted from 1."""
    subset: str
    """The name under which results are reported: that of the file or folder in the settings."""
    prompt: str
    label: str

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.number}"


def read_tasks(name: str, split: Split, data: Rows, problem: Callable[[DataRow], str]) -> list[Task]:
    """The tasks of one split, in the order of the files. `problem` turns a row into `Task.problem`, and raises
    ConfigError on an invalid row. Raises ConfigError if the settings name no file for the split."""
    names = data.train if split == "train" else data.heldout
    if not names:
        raise ConfigError(
            f"task set {name!r} has no {split} rows: name a JSONL or Parquet file or a folder of a "
            f"Hugging Face dataset, e.g. 'tasks.sources[...].data.{split}=[FILE]'"
        )
    rows = [(task_id, row) for task_id, row, _ in _identified(name, split, data)]  # other columns may be large
    _check_unique([row for _, row in rows])
    return [Task(task_id, name, split, problem(row)) for task_id, row in rows]


def chosen_rows(name: str, data: Rows, task_ids: Collection[str]) -> Iterator[dict[str, Any]]:
    """The training rows of these tasks, with all of their columns. Raises ConfigError as `read_rows` does."""
    return (fields for task_id, _, fields in _identified(name, "train", data) if task_id in task_ids)


def row_hash(task: Task) -> str:
    """A hash of a row's problem and label, wherever its file is."""
    problem = {name: value for name, value in json.loads(task.problem).items() if name != "where"}
    return content_hash(json.dumps(problem, sort_keys=True))


def _identified(name: str, split: Split, data: Rows) -> Iterator[tuple[str, DataRow, dict[str, Any]]]:
    """(task id, row, columns) of one split, in the order of the files."""
    counts: Counter[str] = Counter()
    for given in data.train if split == "train" else data.heldout:
        for row, fields in _read(given, data):
            yield f"{name}/{split}/{row.subset}/{counts[row.subset]}", row, fields
            counts[row.subset] += 1


def subset_of(task: Task) -> str:
    """The task set and, if its problems have several sources, the source."""
    return task.task_id.rsplit("/", 1)[0].replace(f"/{task.split}", "", 1)


def read_rows(given: str, data: Rows) -> Iterator[DataRow]:
    """Rows of one entry of the settings. Raises ConfigError on a missing, empty or unreadable file, a missing column,
    an empty prompt or label, and a row that cannot be asked, unless `data.unusable` drops it."""
    return (row for row, _ in _read(given, data))


def left_out(data: Rows, names: Iterable[str]) -> Counter[str]:
    """Reason -> number of the rows of these entries that `data.unusable=drop` leaves out."""
    why: Counter[str] = Counter()
    if data.shape and data.unusable == "drop":
        for given in names:
            for _ in _read(given, data, why):
                pass
    return why


def _read(given: str, data: Rows, dropped: Counter[str] | None = None) -> Iterator[tuple[DataRow, dict[str, Any]]]:
    """(row, its columns); counts the rows that are left out in `dropped`."""
    if data.shape and (data.prompt_column, data.label_column) != (Rows.prompt_column, Rows.label_column):
        raise ConfigError(
            f"data.prompt_column and data.label_column have no effect with data.shape={data.shape}: leave them out"
        )
    files = files_of(given)
    subset = Path(given).stem if "*" not in given else Path(given).parent.name or "rows"
    found = 0
    for file in files:
        for number, fields in _fields(file):
            where = f"{file}, line {number}"
            try:
                shaped = _shaped(fields, data, where)
            except Unusable as reason:
                if data.unusable == "error":
                    raise ConfigError(
                        f"{where}: {reason}; delete the row, or set tasks.sources[...].data.unusable=drop"
                    ) from reason
                if dropped is not None:
                    dropped[str(reason)] += 1
                continue
            found += 1
            name = f"{subset}_{shaped.subset}" if shaped.subset else subset
            yield DataRow(file, number, name, shaped.prompt, shaped.label), fields
    if not found:
        raise ConfigError(f"{given}: no rows in it; give a file with at least one problem")


def _shaped(fields: dict[str, Any], data: Rows, where: str) -> Shaped:
    """Raises Unusable, and ConfigError on another shape."""
    if not data.shape:
        prompt = _text(fields, data.prompt_column, where, "prompt_column")
        return Shaped(prompt, _text(fields, data.label_column, where, "label_column"))
    try:
        shaped = SHAPES[data.shape](fields)
    except WrongRow as error:
        raise ConfigError(
            f"{where}: not a row of data.shape={data.shape}: {error}; give another shape, or correct the row"
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
            return f"{task.source}:{json.loads(task.problem)['prompt']}"
        except (ValueError, KeyError, TypeError):
            pass
    return f"{task.source}:{task.problem}"


def _check_unique(rows: Sequence[DataRow]) -> None:
    first: dict[str, DataRow] = {}
    for row in rows:
        twin = first.setdefault(content_hash(row.prompt), row)
        if twin is not row:
            raise ConfigError(
                f"{row.where}: the same prompt as {twin.where}; delete one, because a duplicate problem counts twice"
            )


def files_of(given: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that an entry of the settings names: one, those of a folder, or those of a pattern. Raises ConfigError
    if there is none."""
    path = Path(given)
    if "*" in given:
        found = sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)) if path.anchor else given))
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in suffixes and not p.name.startswith("cache-"))
        if (path / "dataset_dict.json").exists():
            splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
            raise ConfigError(
                f"{given}: a dataset with several splits ({splits}); name one of them, e.g. {given}/train"
            )
    else:
        found = [path] if path.exists() else []
    if not found:
        raise ConfigError(
            f"{given}: no such file, or no {', '.join(suffixes)} in it; give the path of a dataset on disk"
        )
    for file in found:
        if file.suffix not in suffixes:
            raise ConfigError(
                f"{file}: a dataset is {', '.join(suffixes)}, not {file.suffix or 'a file without suffix'}"
            )
    return found


def _fields(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if file.suffix == ".jsonl":
            yield from _json_lines(file)
        else:
            yield from enumerate(arrow_rows(file), start=1)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); give a whole dataset file") from error


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ConfigError(f"{file}, line {number}: an empty line; delete it")
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{file}, line {number}: not JSON ({error}); fix or delete it") from error
            if not isinstance(fields, dict):
                raise ConfigError(f"{file}, line {number}: not a JSON object with columns; fix or delete it")
            yield number, fields


def arrow_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet or Arrow file. Raises ConfigError if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
                yield from batch.to_pylist()
            return
        with pa.memory_map(str(file)) as source:
            try:
                for batch in pa.ipc.open_stream(source):
                    yield from batch.to_pylist()
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
                for index in range(reader.num_record_batches):
                    yield from reader.get_batch(index).to_pylist()
    except pa.ArrowException as error:
        raise ConfigError(f"{file}: damaged ({str(error).splitlines()[0]}); copy the file again") from error


def _text(fields: dict[str, Any], column: str, where: str, setting: str) -> str:
    if column not in fields:
        raise ConfigError(
            f"{where}: no column {column!r}, there are {', '.join(fields) or 'none'}; give "
            f"tasks.sources[...].data.{setting}=COLUMN with one of them"
        )
    value = fields[column]
    if isinstance(value, dict) and setting == "prompt_column":
        raise ConfigError(f"{where}: column {column!r} is an object; a prompt is text or a list of chat messages")
    text = _spoken(value, where) if _is_messages(value) else _plain(value)
    if not text.strip():
        raise ConfigError(f"{where}: column {column!r} is empty ({value!r}); fix or delete the row")
    return text


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False) if value else ""
    if isinstance(value, list | tuple):
        return json.dumps([v if isinstance(v, dict) else str(v) for v in value], ensure_ascii=False) if value else ""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "content" in m for m in value)


def _spoken(messages: list[dict[str, Any]], where: str) -> str:
    roles = [m.get("role", "user") for m in messages]
    if unknown := set(roles) - {"system", "user"}:
        raise ConfigError(
            f"{where}: a prompt with messages of {', '.join(sorted(map(str, unknown)))}; only system and user messages "
            "are allowed; remove the others"
        )
    return "\n\n".join(str(m["content"] or "") for m in messages)


def id_range(text: str) -> range | None:
    """`0:2420` as a range of task ids; None if it is not a range. Raises ConfigError on an empty range."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        return None
    ids = range(int(match[1]), int(match[2]))
    if not ids:
        raise ConfigError(f"{text!r} is an empty range of task ids; write first:last+1, e.g. 0:2420")
    return ids
