"""Starts the real program: `icrl` in a separate process, or many runs one after another in one process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from icrl_megatron.distributed import net
from icrl_megatron.telemetry.writer import TIME_PREFIX, MetricsRow, read_rows
from icrl_megatron.utils import processes

TIMEOUT_S = 300
RECIPE = "rulebook_easy"
SMALL = (
    "rollout.tasks_per_step=4",
    "rollout.episodes_per_task=4",
    "eval.problems=8",
    "eval.interval=2",
    "eval.control_problems=0",
    "checkpoint.interval=2",
    "algo.on_no_signal=train",
    "algo.max_resamples=0",
)
WARM_START = ("warm_start.steps=12", "warm_start.episodes_per_step=32")
STEPS = 6

ICRL = [sys.executable, "-c", "from icrl_megatron.cli import main; main()"]
_IN_PLACE = Path(__file__).with_name("in_place.py")


@dataclass(frozen=True)
class Ended:
    """The outcome of one command of a batch: its exit code (1 for an exception) and its stderr."""

    code: int
    error: str

    @property
    def said(self) -> str:
        """stderr on one line, since long lines are wrapped."""
        return " ".join(self.error.split())


@dataclass(frozen=True)
class Batch:
    """Commands that ran one after another in one process, and the folder with their runs."""

    folder: Path
    ended: dict[str, Ended]

    def succeeded(self, name: str) -> Ended:
        """The outcome of a command that must have succeeded."""
        assert self.ended[name].code == 0, self.ended[name].error
        return self.ended[name]

    def trained(self, run: str) -> list[MetricsRow]:
        """The rows of a run's training steps."""
        return [row for row in rows(self.folder / run) if "tokens/generated" in row]


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts `icrl ARGUMENTS` as a process; `end` reads its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"COLUMNS": "100"}
    return subprocess.Popen([*ICRL, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); kills the whole process tree on a timeout."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
    return process.returncode, out, err


def icrl(*arguments: str) -> tuple[int, str, str]:
    return end(start(*arguments))


def train(folder: Path, *overrides: str) -> list[str]:
    """The arguments of a small training run in `folder`."""
    return ["train", RECIPE, f"run_dir={folder}", f"steps={STEPS}", *SMALL, *overrides]


def from_model(run: Path) -> list[str]:
    """Overrides that start from the trained model of `finished_run`."""
    return [f"model.path={run / 'warm_start' / 'hf'}", "warm_start.steps=0"]


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Sends SIGKILL to the launcher and all of its descendants at once."""
    tree = processes.tree(process.pid)
    processes.kill_tree(process)
    process.communicate()
    psutil.wait_procs(tree, timeout=30)


def ranks_below(launcher: int) -> list[psutil.Process]:
    """The ranks that a launcher has started: not the agent between them, whose arguments name the module too."""
    found = []
    for process in processes.tree(launcher):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            if "icrl_megatron.train" in words and "icrl_megatron.launch.agent" not in words:
                found.append(process)
    return found


def when(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Polls until `happened()` is true while the process is running."""
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"it ended or hung before that: {process.returncode} {process.communicate(timeout=1)}")
        time.sleep(0.002)


def has_child(process: subprocess.Popen[str]) -> bool:
    """Whether the launcher has started its agent, and so has installed its signal handlers."""
    return bool(psutil.Process(process.pid).children())


def signalled(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, str]:
    process.send_signal(number)
    return end(process)


def rows(folder: Path) -> list[MetricsRow]:
    """metrics.jsonl without the metrics that depend on the clock or on the process's other memory."""
    return [
        {k: v for k, v in row.items() if not k.startswith((TIME_PREFIX, "memory/"))}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def batch(folder: Path, commands: dict[str, Sequence[str]]) -> dict[str, Ended]:
    """Runs `icrl` commands one after another in one process that is already a rank, so that no ranks are started."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    rank["MASTER_PORT"] = str(net.free_port())
    (folder / "commands.json").write_text(json.dumps({name: list(c) for name, c in commands.items()}))
    done = subprocess.run(
        [sys.executable, str(_IN_PLACE), str(folder / "commands.json"), str(folder / "ended.json")],
        env={**os.environ, **rank},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return {name: Ended(**how) for name, how in json.loads((folder / "ended.json").read_text()).items()}
