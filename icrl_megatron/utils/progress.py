"""Progress output: bars in a terminal, occasional plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from icrl_megatron.utils.console import PlainConsole
from icrl_megatron.utils.terminal import guard

PLAIN_INTERVAL_S = 10.0
"""Seconds between two lines of a phase if the output is not a terminal."""


class Phase:
    """A running phase; `advance` may be called any number of times."""

    def __init__(self, owner: Progress, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.note = ""
        self._owner = owner
        self._started = self._last_line = time.monotonic()
        self._bar = owner.bars.add_task(name, total=total, note="") if owner.bars else None

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """`n` more units are done; `note` replaces the few words at the end of the bar (None keeps them)."""
        self.done += n
        self.note = self.note if note is None else note
        if self._owner.bars is not None and self._bar is not None:
            self._owner.bars.update(self._bar, completed=self.done, note=self.note)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._line()

    def finish(self) -> None:
        if self._owner.bars is not None and self._bar is not None:
            self._owner.bars.remove_task(self._bar)
        elif time.monotonic() - self._started >= PLAIN_INTERVAL_S:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        count = f"{self.done or ''}" if self.total is None else f"{self.done}/{self.total}"
        seconds = f"{self._last_line - self._started:.0f} s"
        self._owner.log("  ".join(part for part in (self.name, count, seconds, self.note) if part))


class Progress:
    """Rank 0 creates an enabled one; with `enabled=False` (all other ranks) it prints nothing.

    Phases may be nested (the run, and within it the rollouts of a step). Without a terminal a phase writes a line
    every 10 s, and one when it ends if it lasted that long.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.enabled = enabled
        self.console = console or PlainConsole(stderr=True)
        self.bars: Bars | None = None
        self._open = 0

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Phase]:
        """A phase of `total` units (None: unknown). Its bar is removed when the block ends, even on an error."""
        if self._open == 0 and self.enabled and self.console.is_terminal:
            self.bars = self._make_bars()
            self.bars.start()
            guard()  # rich replaces sys.stdout and sys.stderr while bars are shown
        self._open += 1
        phase = Phase(self, name, total)
        try:
            yield phase
        finally:
            phase.finish()
            self._open -= 1
            if self._open == 0 and self.bars is not None:
                self.bars.stop()
                self.bars = None

    def log(self, text: str) -> None:
        """Prints one permanent line above the bars."""
        if self.enabled:
            with suppress(OSError):  # a full disk behind stderr loses these lines but does not end the run
                self.console.print(text, highlight=False, markup=False)

    def _make_bars(self) -> Bars:
        return Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.console,
            transient=True,
        )
