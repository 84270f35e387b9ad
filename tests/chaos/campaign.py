"""One run folder that is interrupted again and again, and how far the run was each time."""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import whole_runs

from icrl_megatron.utils import processes
from icrl_megatron.utils.step_names import step_name, step_of, steps_in

Strike = Callable[["Campaign", random.Random], None]
LIMIT_S = 120.0
STARTUP_S = 9.0
"""About how long a run takes to its first step here; random moments in the start-up are drawn from it."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault. `needs` says what is missing to play it here; empty: it can be played."""

    name: str
    strike: Strike
    needs: Callable[[], str] = lambda: ""


@dataclass
class Record:
    """What one fault cost."""

    fault: str
    detail: str = ""
    lost: int = 0
    """Steps that a checkpoint held and that the resumed run did not go on from."""
    doubled: int = 0
    """Rows that the finished metrics hold twice; counted at the campaign's last fault."""
    replayed: int = 0
    """Steps after the newest checkpoint, played again."""
    survived: bool = True


@dataclass
class Campaign:
    folder: Path
    logs: Path
    command: list[str]
    steps: int
    program: tuple[str, ...] = tuple(whole_runs.ICRL)
    environment: dict[str, str] = field(default_factory=dict)
    """More variables for the run."""
    process: subprocess.Popen[bytes] = field(init=False)
    records: list[Record] = field(default_factory=list)
    starts: int = 0
    listened: bool = False
    """Whether the launcher had started its ranks, and so listened to signals, when the last moment was reached."""
    _given_up: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Starts the command, unless it is still running. Each start writes a log of its own beside the run folder."""
        if self.running():
            return
        self.starts += 1
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"COLUMNS": "200"}
        env |= self.environment
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*self.program, *self.command], env=env, stdout=log, stderr=log)

    @property
    def faults(self) -> Path:
        """Where `faulty_run.py` looks for what goes wrong next."""
        return self.logs / "faults"

    @property
    def log(self) -> Path:
        return self.logs / f"{self.starts}.log"

    def running(self) -> bool:
        return self.starts > 0 and self.process.poll() is None

    def end(self) -> tuple[int, str]:
        """Waits for the end: (exit code, what was printed)."""
        code = self.process.wait(LIMIT_S)
        return code, self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL for the launcher and everything below it, at once."""
        tree = self.tree()
        processes.kill_tree(self.process)
        psutil.wait_procs(tree, timeout=30)

    def go_to_random_moment(self, rng: random.Random) -> None:
        """Waits for a random moment: some in the start-up, most in a random step. Returns early if the run ends."""
        if rng.random() < 0.3:
            self.wait(lambda: False, rng.uniform(0, STARTUP_S))
        else:
            self._wait_for_rows(self.last_row() + rng.randint(1, 8))
            time.sleep(rng.uniform(0, 0.3))
        self.listened = self.running() and len(self.tree()) > 1

    def go_to_step(self, step: int) -> None:
        self.wait(lambda: self.last_step() >= step, LIMIT_S)

    def _wait_for_rows(self, row: int) -> None:
        self.wait(lambda: self.last_row() >= row, LIMIT_S)

    def wait(self, happened: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and self.running() and not happened():
            time.sleep(0.005)

    def tree(self) -> list[psutil.Process]:
        return processes.tree(self.process.pid) if self.running() else []

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        return whole_runs.ranks_below(self.process.pid) if self.running() else []

    def checkpoints(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        root = self.folder / "checkpoints"
        found = (name for name in map(step_name, steps_in(root)) if (root / name / "icrl.json").exists())
        return [name for name in found if name not in self._given_up]

    def saved(self) -> int:
        """Step of the newest complete checkpoint; 0 for none."""
        names = self.checkpoints()
        return step_of(names[-1]) or 0 if names else 0

    def damaged(self, name: str, how: str) -> None:
        """From now on `name` does not count as a checkpoint."""
        self._given_up.add(name)
        self.records[-1].detail = f"{name}: {how}"

    def last_row(self) -> int:
        return whole_runs.lines(self.folder)

    def last_step(self) -> int:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return 0
        steps = re.findall(rb'^\{"step": (\d+)', path.read_bytes(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def strike(self, fault: Fault, rng: random.Random) -> None:
        """Plays one fault, starts the run again if it ended, and measures what was lost."""
        self.begin()
        self.records.append(Record(fault.name))
        fault.strike(self, rng)
        if self.running():
            return
        saved, reached = self.saved(), self.last_step()
        self.begin()
        self.wait(lambda: self.resumed_from() is not None or (saved == 0 and self.last_row() > 0), LIMIT_S)
        self.records[-1].replayed = max(0, reached - saved)
        if saved > 0:
            resumed = self.resumed_from()
            assert resumed is not None, self.log.read_text(errors="replace")[-2000:]
            self.records[-1].lost = max(0, saved - resumed)

    def resumed_from(self) -> int | None:
        """Step of the checkpoint that the newest process went on from; None while it has not said so."""
        said = re.findall(r"resuming from \S*step_(\d+)", self.log.read_text(errors="replace"))
        return int(said[-1]) if said else None
