"""The state of a run: restored from a checkpoint at the start, saved after any completed step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from icrl_megatron.actor import checkpoint
from icrl_megatron.actor.export import write_hf
from icrl_megatron.data.curriculum import cut_history, read_history
from icrl_megatron.distributed.grid import any_rank, gather_objects, run_on_all_ranks
from icrl_megatron.distributed.process import StopRequest
from icrl_megatron.model.weights import Gatherer
from icrl_megatron.run.files import EXPORT
from icrl_megatron.run.parts import Parts
from icrl_megatron.run.saving import Files, Saver
from icrl_megatron.telemetry.dump_writer import DumpWriter
from icrl_megatron.telemetry.metrics import GENERATED
from icrl_megatron.telemetry.trackers import TableRow, Trackers, flat
from icrl_megatron.telemetry.writer import METRICS_FILE, MetricsRow, MetricsWriter, read_rows
from icrl_megatron.utils.results import MOVE_AWAY

REPLAY = "replay.jsonl"
"""In a checkpoint: unfinished episodes (`rollout.partial`, `rollout.staleness`)."""
NEWEST_ROWS = "metrics.jsonl"
"""In a checkpoint: the rows of its step."""
PENDING = "row.json"
"""In a checkpoint: the metrics of its step, if the step's evaluation failed before they were in metrics.jsonl."""


class RunState:
    """Step, generated tokens and metrics.jsonl of a run. Every rank calls each method; rank 0 writes the files."""

    def __init__(self, parts: Parts, saver: Saver, stop: StopRequest, log: Callable[[str], None]) -> None:
        """Loads the checkpoint that the run resumes from, or `start_from`; does not send its weights to the engines."""
        self.parts, self.saver, self.run_dir = parts, saver, saver.run_dir
        self.step = self.generated = 0
        self.pending: MetricsRow | None = None
        """The metrics of the last step until they are written."""
        self.ended_early = False
        """Whether the held-out loss of supervised training has stopped falling (`warm_start.patience`)."""
        self._stop, self._log = stop, log
        newest: list[MetricsRow] = []
        resumed = saver.restore()
        if resumed is not None:
            self._take_back(saver.folder / REPLAY)
            self.step, self.generated = resumed.step, resumed.generated_tokens
            parts.sync.version = max(0, resumed.weight_version - 1)  # the first push has that version again
            self.pending, newest = _read_pending(saver.folder / PENDING), read_rows(saver.folder / NEWEST_ROWS)
        elif parts.settings.start_from:
            self._start_from(Path(parts.settings.start_from))
        main = parts.grid.rank == 0
        self._resume_curriculum(main)
        written = None if resumed is None else self.step - (self.pending is not None)
        self._writer = run_on_all_ranks(
            parts.grid, lambda: MetricsWriter(self.run_dir, written, newest) if main else None
        )
        self.dumps = run_on_all_ranks(
            parts.grid, lambda: DumpWriter(self.run_dir, parts.grid.rank, parts.grid.world, self.step)
        )
        self._losses, self._dump_failed = 0, False
        self._trackers = run_on_all_ranks(parts.grid, lambda: self._start_trackers() if main else None)
        self.completed(self.pending)

    def _start_trackers(self) -> Trackers:
        settings = self.parts.settings
        name = settings.name if self.parts.purpose == "train" else f"{settings.name}-{self.parts.purpose}"
        return Trackers(settings.trackers, name, self.run_dir, flat(settings), self._log)

    def _start_from(self, folder: Path) -> None:
        """Loads another run's checkpoint: fp32 weights, which `model.path` may have rounded, and its moments."""
        actor, moments = self.parts.actor, self.parts.settings.start_with_moments
        checkpoint.load(folder, actor.rows, actor.optimizer, self.parts.grid)
        if not moments:
            actor.optimizer.forget()
        self._log(f"starting from {folder} {'with' if moments else 'without'} its optimizer moments")

    def _take_back(self, path: Path) -> None:
        """Resumes the groups that were begun and not trained on, if their problems are still training problems."""
        if dropped := self.parts.source.restore(path, self.parts.sampler.known):
            self._log(f"{dropped} unfinished groups are dropped: their problems are no longer trained on")

    def _resume_curriculum(self, main: bool) -> None:
        """Replays the success shares of the steps before the checkpoint. Every rank reads the file, then rank 0 removes
        the lines of later steps."""
        curriculum = self.parts.sampler.curriculum
        if curriculum is None:
            return
        for shares in read_history(self.run_dir, self.step, self.parts.sampler.known):
            curriculum.observe(shares)
        any_rank(self.parts.grid, False)  # every rank has read it
        if main:
            cut_history(self.run_dir, self.step)

    def finished(self) -> bool:
        limit = self.parts.settings.max_generated_tokens
        return (
            self.ended_early
            or self.step >= self.parts.settings.steps
            or (limit is not None and self.generated >= limit)
        )

    def stop_requested(self) -> bool:
        """The same result on every rank, so that all stop at the same step."""
        return any_rank(self.parts.grid, bool(self._stop))

    def completed(self, pending: MetricsRow | None) -> None:
        """Marks the step as done: from now on it is saved after an error, with its metrics if they are `pending`."""
        optimizer, unfinished = self.parts.actor.optimizer, self.parts.source.unfinished()

        def beside() -> Files:
            lines = [line for of in gather_objects(self.parts.grid, unfinished()) for line in of]
            self.dumps.flush()  # no step of a checkpoint is played again
            self._count_losses()
            found = {REPLAY: lines} if lines else {}
            rows = run_on_all_ranks(self.parts.grid, lambda: self._writer.saved() if self._writer is not None else [])
            found |= {NEWEST_ROWS: rows or []}
            return found | ({PENDING: [json.dumps(pending)]} if pending is not None else {})

        self.pending = pending
        progress = checkpoint.SavedProgress(self.step, self.parts.sync.version, optimizer.steps, self.generated)
        self.saver.completed(progress, beside)

    def not_dumped(self) -> int:
        """Episodes of all ranks whose dump failed since the last call. Logs the reason of the first failure."""
        self._count_losses()
        taken, self._losses = self._losses, 0
        return taken

    def _count_losses(self) -> None:
        everyone = gather_objects(self.parts.grid, self.dumps.take_losses())
        reason = next((losses.reason for losses in everyone if losses.reason), "")
        if reason and not self._dump_failed:
            self._dump_failed = True
            self._log(f"step {self.step}: episodes are not dumped, training goes on (episodes/not_dumped): {reason}")
        self._losses += sum(losses.episodes for losses in everyone)

    def by_first_rank(self, write: Callable[[], object]) -> None:
        """Writes files on rank 0; if that fails, all ranks raise."""
        run_on_all_ranks(self.parts.grid, lambda: write() if self._writer is not None else None)

    def write(self, row: MetricsRow, table: Sequence[TableRow] = ()) -> None:
        """Appends one row of this step to metrics.jsonl, TensorBoard and the trackers, which get a few episodes too."""
        self.by_first_rank(lambda: self._write(row, table))

    def _write(self, row: MetricsRow, table: Sequence[TableRow]) -> None:
        assert self._writer is not None and self._trackers is not None
        self._writer.write(self.step, row)
        self._trackers.write(self.step, row, table)

    def evaluated(self) -> bool:
        """Whether the last row of the metrics is an evaluation at this step; the same result on every rank."""
        rows = read_rows(self.run_dir / METRICS_FILE) if self._writer is not None else []
        ends = bool(rows) and rows[-1]["step"] == self.step and GENERATED not in rows[-1]
        return any_rank(self.parts.grid, ends)

    def save(self) -> None:
        """Saves the last completed step, once."""
        self.saver.save()
        self.parts.source.saved(self.step)

    def save_if_due(self) -> None:
        due = self.step % self.parts.settings.checkpoint.interval == 0 or self.saver.best == self.step
        if due and not self.finished():
            self.save()

    def conclude(self) -> None:
        """Saves the last checkpoint and exports the model: the last step, or the best one (`Saver.best`)."""
        self.save()
        self.saver.load_best()
        actor, grid = self.parts.actor, self.parts.grid
        write_hf(Gatherer(actor.rows, grid), self.saver.model, self.run_dir / EXPORT, grid, remedy=MOVE_AWAY)

    def close(self) -> None:
        """Closes the metrics, the trackers and the dumps, however the run ends."""
        self.dumps.close()
        if self._writer is not None:
            self._writer.close()
        if self._trackers is not None:
            self._trackers.close()


def _read_pending(path: Path) -> MetricsRow | None:
    """The row that a checkpoint was saved with if its evaluation had failed; the file was verified before."""
    row: MetricsRow | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return row
