"""A run that is interrupted repeatedly, and its progress at each interruption."""

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

Apply = Callable[["Campaign", random.Random], None]
LIMIT_S = 120.0
STARTUP_S = 9.0
"""Approximate seconds until a run's first step; random times during the start-up are drawn from this range."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault. `needs` returns what this machine lacks for it; empty: nothing."""

    name: str
    apply: Apply
    needs: Callable[[], str] = lambda: ""


@dataclass
class Record:
    """The effects of one fault."""

    fault: str
    detail: str = ""
    lost: int = 0
    """Steps that were in a checkpoint but not in the one that the run resumed from."""
    doubled: int = 0
    """Duplicate rows in the final metrics; counted at the campaign's last fault."""
    replayed: int = 0
    """Steps after the newest checkpoint that were run again."""
    survived: bool = True


@dataclass
class Campaign:
    folder: Path
    logs: Path
    command: list[str]
    steps: int
    program: tuple[str, ...] = tuple(whole_runs.ICRL)
    environment: dict[str, str] = field(default_factory=dict)
    """Additional environment variables of the run."""
    process: subprocess.Popen[bytes] = field(init=False)
    records: list[Record] = field(default_factory=list)
    starts: int = 0
    listened: bool = False
    """Whether the launcher had started its ranks, and so had its signal handlers, at the last random time."""
    _damaged: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Starts the command unless it is running. Each start writes a separate log beside the run folder."""
        if self.running():
            return
        self.starts += 1
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"COLUMNS": "200"}
        env |= self.environment
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*self.program, *self.command], env=env, stdout=log, stderr=log)

    @property
    def faults(self) -> Path:
        """The folder in which `faulty_run.py` finds the next fault."""
        return self.logs / "faults"

    @property
    def log(self) -> Path:
        return self.logs / f"{self.starts}.log"

    def running(self) -> bool:
        return self.starts > 0 and self.process.poll() is None

    def end(self) -> tuple[int, str]:
        """Waits for the end; returns (exit code, output)."""
        code = self.process.wait(LIMIT_S)
        return code, self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Sends SIGKILL to the launcher and all its descendants."""
        tree = self.tree()
        processes.kill_tree(self.process)
        psutil.wait_procs(tree, timeout=30)

    def wait_for_random_time(self, rng: random.Random) -> None:
        """Waits for a random time, mostly in a random step, else during the start-up; returns early if the run ends."""
        if rng.random() < 0.3:
            self.wait(lambda: False, rng.uniform(0, STARTUP_S))
        else:
            self._wait_for_rows(self.last_row() + rng.randint(1, 8))
            time.sleep(rng.uniform(0, 0.3))
        self.listened = self.running() and len(self.tree()) > 1

    def wait_for_step(self, step: int) -> None:
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
        """The training ranks."""
        return whole_runs.ranks_below(self.process.pid) if self.running() else []

    def checkpoints(self) -> list[str]:
        """Names of the complete checkpoints, oldest first."""
        root = self.folder / "checkpoints"
        found = (name for name in map(step_name, steps_in(root)) if (root / name / "icrl.json").exists())
        return [name for name in found if name not in self._damaged]

    def saved(self) -> int:
        """Step of the newest complete checkpoint; 0 for none."""
        names = self.checkpoints()
        return step_of(names[-1]) or 0 if names else 0

    def damaged(self, name: str, how: str) -> None:
        """Marks the checkpoint `name` as damaged; from now on it is not counted."""
        self._damaged.add(name)
        self.records[-1].detail = f"{name}: {how}"

    def last_row(self) -> int:
        return whole_runs.lines(self.folder)

    def last_step(self) -> int:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return 0
        steps = re.findall(rb'^\{"step": (\d+)', path.read_bytes(), re.MULTILINE)
        return int(steps[-1]) if steps else 0

    def apply(self, fault: Fault, rng: random.Random) -> None:
        """Applies one fault, restarts the run if it ended, and records what was lost."""
        self.begin()
        self.records.append(Record(fault.name))
        fault.apply(self, rng)
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
        """Step of the checkpoint that the newest process resumed from; None until it is printed."""
        said = re.findall(r"resuming from \S*step_(\d+)", self.log.read_text(errors="replace"))
        return int(said[-1]) if said else None
