"""Which episodes of a step are dumped, and the thread that writes those of one rank. Dumps never end a run.

A step costs the training loop only the choice. One step is being written and at most one waits, so that memory stays
bounded. A step that finds no room waits `WAIT_S` seconds at most, and is then left out; while the thread still makes
no progress, later steps are left out at once. What is left out, or cannot be written, is counted.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icrl_megatron.telemetry.dump_shards import cut, shard_path
from icrl_megatron.telemetry.dumps import Credit, Decode, encoded
from icrl_megatron.types import Episode
from icrl_megatron.utils.files import AppendFile

WAIT_S = 10.0
"""How long a step waits for room."""
FLUSH_S = 60.0
"""How long a checkpoint, and the end of the run, wait until everything is on the disk."""


def chosen(episodes: Iterable[tuple[str, int]], limit: int | None, seed: int, step: int) -> set[tuple[str, int]]:
    """The (task id, index) of the episodes that are dumped, out of those of all ranks; the same on every rank.

    At most `limit`, or all if that is None. A hash of `seed`, `step` and the task's id chooses the tasks, so that the
    choice does not depend on the ranks. Each task is dumped with all of its episodes, because credit
    compares these; only the last task may be cut.
    """
    everyone = set(episodes)
    if limit is None or len(everyone) <= limit:
        return everyone
    hashes = {task: hashlib.blake2b(f"{seed}/{step}/{task}".encode(), digest_size=8).digest() for task, _ in everyone}
    return set(sorted(everyone, key=lambda one: (hashes[one[0]], *one))[:limit])


@dataclass(frozen=True)
class StepDump:
    """What one rank dumps of a step."""

    step: int
    episodes: Sequence[tuple[Episode, Credit]]
    decode: Decode
    """Token ids to text. It is called in the writer's thread."""


@dataclass(frozen=True)
class Losses:
    """Episodes that were not written."""

    episodes: int = 0
    """0 if all were written, but syncing them to the disk failed."""
    reason: str = ""
    """Reason of the first loss; empty if nothing failed."""


class DumpWriter:
    """Appends the episodes of one rank to its shard, in a thread."""

    def __init__(self, run_dir: Path, rank: int, world: int, step: int) -> None:
        """Removes what the run wrote after `step`, from which it continues. Raises as `cut`."""
        cut(run_dir, step, rank, world)
        self._path = shard_path(run_dir, rank)
        self._changed = threading.Condition()
        self._waiting: StepDump | None = None
        self._writing = self._stuck = self._closing = False
        self._losses = Losses()
        self._thread: threading.Thread | None = None
        self._file: AppendFile | None = None

    def submit(self, dump: StepDump) -> None:
        """Returns as soon as there is room."""
        if not dump.episodes:
            return
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting is None, 0.0 if self._stuck else WAIT_S):
                self._stuck = True
                self._lose(len(dump.episodes), f"{self._path}: two steps are still being written")
                return
            self._waiting = dump
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="dumps", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Returns when every submitted step is on the disk, or could not be written, or after `FLUSH_S`."""
        with self._changed:
            idle = self._changed.wait_for(lambda: self._waiting is None and not self._writing, FLUSH_S)
            if not idle:
                self._lose(0, f"{self._path}: still being written after {FLUSH_S:g} s")

    def take_losses(self) -> Losses:
        """What was lost since the last call."""
        with self._changed:
            taken, self._losses = self._losses, Losses()
            return taken

    def close(self) -> None:
        """Waits as `flush`, and ends the thread."""
        self.flush()
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (dump := self._next()) is not None:
            self._write(dump)
            with self._changed:
                self._writing = False
                self._changed.notify_all()
        if self._file is not None:
            self._file.close()

    def _next(self) -> StepDump | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closing)
            taken, self._waiting = self._waiting, None
            self._writing, self._stuck = taken is not None, False
            self._changed.notify_all()
            return taken

    def _write(self, dump: StepDump) -> None:
        written = 0
        try:
            if self._file is None:
                self._file = AppendFile(self._path, "the rollouts")
            for episode, credit in dump.episodes:
                self._file.write(encoded(dump.step, episode, credit, dump.decode))
                written += 1
            self._file.sync()
        except Exception as error:  # whatever it is, training goes on
            message = str(error) or repr(error)
            with self._changed:
                self._lose(len(dump.episodes) - written, message)

    def _lose(self, episodes: int, reason: str) -> None:
        before = self._losses
        self._losses = Losses(before.episodes + episodes, before.reason or reason)
