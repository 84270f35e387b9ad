"""Metrics to metrics.jsonl and TensorBoard: a run that was killed and resumed leaves the rows of one that was not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from icrl_megatron.config import ConfigError
from icrl_megatron.telemetry.files import write_atomically

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TIME_PREFIX = "time/"
"""Names of wall-clock measurements start with this: the only ones that differ between two runs of the same settings."""

Row = dict[str, float]


class MetricsWriter:
    """One JSON object per `write` in <run_dir>/metrics.jsonl, the same numbers as TensorBoard scalars. Rank 0 only.

    `resume_step` is the step of the checkpoint the run goes on from: rows of later steps are cut, the others stay. None
    starts an empty file. Raises ConfigError if the folder cannot be written.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # those who only read rows need no torch

        self.path = Path(run_dir) / METRICS_FILE
        kept = [r for r in read_rows(self.path) if resume_step is not None and r["step"] <= resume_step]
        write_atomically(self.path, map(_line, kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(self.path.parent / TENSORBOARD_FOLDER), purge_step=0 if resume_step is None else resume_step + 1
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one row; it is on its way to the disk when this returns."""
        self._file.write(_line({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a metrics.jsonl, none if there is no file. A last line cut short by a crash is left out; numbers that
    were not finite come back as NaN. Raises ConfigError on any other damage."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[Row] = []
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
    # JSON has no NaN: null stands for every number that is not finite.
    return json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()})
