"""Experiment trackers in addition to metrics.jsonl and TensorBoard. A tracker never ends a run or delays it for long.

Each tracker has its own thread with a bounded queue. A tracker that fails is reported once, counted, and not used again
in this process; metrics.jsonl stays complete. To add a tracker, write telemetry/<name>_tracker.py with a `Start`
function, and add the name to `TRACKERS` in settings/schema.py.
"""

from __future__ import annotations

import importlib
import json
import queue
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Protocol

from icrl_megatron.settings.schema import TRACKERS, TrackerSettings
from icrl_megatron.types import Episode
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import write_atomically

MODULES = {name: f"icrl_megatron.telemetry.{name}_tracker" for name in TRACKERS}
"""Name (also that of the Python package) -> module with a `start` function."""
STATE_FILE = "trackers.json"
"""In the run folder: each tracker's run id and the last step it received."""
QUEUE_ITEMS = 256
CLOSE_TIMEOUT_S = 60.0
COLUMNS = ("task", "episode", "round", "role", "reward", "text")
"""Columns of the episode table."""


@dataclass(frozen=True)
class Identity:
    """What a tracker needs to start or resume its run."""

    settings: TrackerSettings
    name: str
    run_id: str
    resumed: bool
    folder: Path
    """The run folder; offline data is written below it."""
    config: Mapping[str, object]
    """The run's settings by dotted name."""


TableRow = tuple[str, int, int, str, float, str]
"""One attempt or critique, in the order of `COLUMNS`."""


def table_rows(episodes: Iterable[Episode], limit: int) -> list[TableRow]:
    """The first `limit` attempts and critiques of the episodes, in the order they were written."""
    rows: list[TableRow] = []
    for episode in episodes:
        task, index = episode.task.task_id, episode.index
        for attempt in episode.attempts:
            said = "\n\n".join(turn.text for turn in attempt.turns)
            role = "revision" if attempt.round else "attempt"
            rows.append((task, index, attempt.round, role, attempt.outcome, said))
            critiques = [c for c in episode.critiques if c.round == attempt.round]
            rows += [(task, index, c.round, "critique", attempt.outcome, c.text) for c in critiques]
        if len(rows) >= limit:
            break
    return rows[:limit]


def flat(settings: object, prefix: str = "") -> dict[str, object]:
    """Settings by dotted name; lists as text."""
    found: dict[str, object] = {}
    for name, value in vars(settings).items():
        if is_dataclass(value):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if value is None or isinstance(value, int | float | str) else str(value)
    return found


class Sink(Protocol):
    """One tracker's open run. Its methods run in the tracker's thread and may block or raise."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of one step; step numbers never decrease."""
        ...

    def table(self, step: int, rows: Sequence[TableRow]) -> None:
        """Logs a few episodes of one step."""
        ...

    def close(self) -> None:
        """Flushes and ends the run."""
        ...


OpenTracker = Callable[[Identity], Sink]


class Trackers:
    """All trackers of a run, on rank 0."""

    def __init__(
        self,
        settings: TrackerSettings,
        name: str,
        folder: Path,
        config: Mapping[str, object],
        log: Callable[[str], None],
    ) -> None:
        self._settings, self._path = settings, folder / STATE_FILE
        self._state: dict[str, dict[str, object]] = _read(self._path) if settings.names else {}
        self._threads = []
        for tracker in settings.names:
            known = self._state.setdefault(tracker, {})
            resumed = "run_id" in known
            run_id = str(known.setdefault("run_id", uuid.uuid4().hex))
            first = int(str(known.get("last_step", -1))) + 1  # an earlier process logged the steps before it
            identity = Identity(settings, settings.run_name or name, run_id, resumed, folder, config)
            self._threads.append(_Thread(tracker, identity, first, log))
        self._save()

    @property
    def failed(self) -> int:
        """Number of trackers that failed and get no more metrics."""
        return sum(thread.failed for thread in self._threads)

    def write(self, step: int, metrics: Mapping[str, float], rows: Sequence[TableRow] = ()) -> None:
        """Queues one step and returns at once. A tracker that got this step before a resume does not get it again."""
        longest, most = self._settings.max_chars, self._settings.episodes
        short = [(*row[:5], row[5][:longest]) for row in rows[:most]]
        for thread in self._threads:
            if thread.put(step, metrics, short):
                self._state[thread.name]["last_step"] = step
        self._save()

    def close(self) -> None:
        """Waits a bounded time until the queues are empty."""
        for thread in self._threads:
            thread.close()

    def _save(self) -> None:
        if self._threads:
            write_atomically(self._path, [json.dumps(self._state, indent=1)], "the trackers' state")


class _Thread:
    def __init__(self, name: str, identity: Identity, first_step: int, log: Callable[[str], None]) -> None:
        self.name, self.failed, self._first, self._log = name, False, first_step, log
        self._queue: queue.Queue[tuple[int, Mapping[str, float], Sequence[TableRow]] | None] = queue.Queue(QUEUE_ITEMS)
        self._thread = threading.Thread(target=self._run, args=(identity,), name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def put(self, step: int, metrics: Mapping[str, float], rows: Sequence[TableRow]) -> bool:
        if self.failed or step < self._first:
            return False
        try:
            self._queue.put_nowait((step, dict(metrics), rows))
        except queue.Full:
            self._fail(f"it is {QUEUE_ITEMS} steps behind")
            return False
        return True

    def close(self) -> None:
        try:
            self._queue.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._fail(f"it did not end within {CLOSE_TIMEOUT_S:g} s")

    def _run(self, identity: Identity) -> None:
        try:
            start: OpenTracker = importlib.import_module(MODULES[self.name]).start
            sink = start(identity)
            while (item := self._queue.get()) is not None:
                step, metrics, rows = item
                sink.log(step, metrics)
                if rows:
                    sink.table(step, rows)
            sink.close()
        except BaseException as error:  # a tracker may raise SystemExit, which a thread would swallow
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        if not self.failed:
            self.failed = True
            self._log(f"{self.name} gets no more metrics ({why[:500]}); metrics.jsonl has all of them")


def _read(path: Path) -> dict[str, dict[str, object]]:
    """The state that an earlier process saved. Raises ConfigError if the file is damaged."""
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): {"run_id": str(of["run_id"]), "last_step": int(of.get("last_step", -1))}
            for name, of in state.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it, and the trackers will start new runs") from error
