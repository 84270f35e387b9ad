"""Metrics in metrics.jsonl and TensorBoard: a killed and resumed run has the same rows as an uninterrupted one."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import AppendFile, write_atomically

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TIME_PREFIX = "time/"
"""Prefix of wall-clock metrics, the only ones that differ between two runs with the same settings."""

MetricsRow = dict[str, float]


class MetricsWriter:
    """On rank 0, writes one JSON object per `write` to <run_dir>/metrics.jsonl, and the same as TensorBoard scalars.

    `resume_step` is the step of the checkpoint from which the run resumes: rows of later steps are removed. None starts
    an empty file. `newest` are the last step's rows from the checkpoint (`saved`): those missing in the file are
    restored. Raises ConfigError if the folder cannot be written.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None, newest: Sequence[MetricsRow] = ()) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        kept = [r for r in read_rows(self.path) if resume_step is not None and r["step"] <= resume_step]
        self._newest = list(newest)
        kept += self._newest[sum(r["step"] == newest[0]["step"] for r in kept) :] if newest else []
        what = f"the metrics of run_dir={run_dir}"
        write_atomically(self.path, map(_line, kept), what)
        self._file = AppendFile(self.path, what)
        self._board = ScalarBoard(self.path.parent / TENSORBOARD_FOLDER, 0 if resume_step is None else resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row; the operating system has it when this returns."""
        row = {"step": step, **metrics}
        self._file.write(f"{_line(row)}\n".encode())
        self._newest = [*(r for r in self._newest if r["step"] == step), row]
        self._board.write(step, metrics)

    def saved(self) -> list[str]:
        """The newest step's rows, one JSON object each, for a checkpoint about to be written. All rows are on disk when
        this returns, so that a crash cannot lose the metrics of steps that a checkpoint contains."""
        self._file.sync()
        return [_line(row) for row in self._newest]

    def close(self) -> None:
        self._file.close()
        self._board.close()


class ScalarBoard:
    """A TensorBoard event file of scalars, one record per step. Not TensorBoard's own writer, which writes in a thread,
    where a disk error ends in a traceback that cannot be caught."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Starts a file; TensorBoard discards the records of earlier files from `first_step` on."""
        from tensorboard.compat.proto import event_pb2, summary_pb2  # not needed to read rows
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # Time in nanoseconds, because TensorBoard reads the files in the order of their names.
        name = f"events.out.tfevents.{time.time():020.9f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendFile(folder / name, "the TensorBoard events")
        self._records = RecordWriter(self._file)
        self._add(step=first_step, file_version="brain.Event:2")
        self._add(step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def read_rows(path: str | Path) -> list[MetricsRow]:
    """The rows of a metrics.jsonl; empty if the file does not exist. A last line that a crash truncated is skipped;
    numbers that were not finite are NaN. Raises ConfigError on any other damage."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[MetricsRow] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append(
                {name: math.nan if value is None else value for name, value in row.items()} | {"step": row["step"]}
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path}, line {number} is damaged: delete that line, or start in another run_dir."
            ) from error
    return rows


def _line(row: Mapping[str, float]) -> str:
    # JSON has no NaN: numbers that are not finite are written as null.
    return json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()})
