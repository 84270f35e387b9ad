"""One of two tensor-parallel ranks that execute runs in which only one rank fails: RANK RENDEZVOUS FOLDER.

FOLDER/ended_RANK.json records how each run ended; the tests read it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.update(RANK=sys.argv[1], LOCAL_RANK=sys.argv[1], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")

from run_faults import fault

from icrl_megatron import train
from icrl_megatron.actor import checkpoint, manifest
from icrl_megatron.actor.optimizer import Optimizer
from icrl_megatron.distributed import net
from icrl_megatron.run import saving
from icrl_megatron.settings.loading import load

RANK = int(sys.argv[1])
NEVER, ALWAYS = "checkpoint.interval=1000", "checkpoint.interval=1"


@contextmanager
def poisoned() -> Iterator[None]:
    """The third update leaves a NaN in an optimizer moment on the last rank, like an overflow."""
    update = Optimizer.step

    def updating(self: Optimizer, *how: Any, **named: Any) -> Any:
        done = update(self, *how, **named)
        if self.begun == 3 and RANK == 1:
            parameter = next(iter(self.distributed.model_param_group_index_map))
            self._shards(parameter)["exp_avg"].view(-1)[0] = float("nan")
        return done

    with patch.object(Optimizer, "step", updating):
        yield


@contextmanager
def no_large_files() -> Iterator[None]:
    """The kernel rejects this rank's shards of the third checkpoint, like a full disk."""
    write = checkpoint._write

    def writing(part: Path, *what: Any) -> Any:
        if part.name.startswith("step_000003"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        return write(part, *what)

    with patch.object(checkpoint, "_write", writing):
        yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextmanager
def blind() -> Iterator[None]:
    """This rank does not see a file that exists."""

    def checking(folder: Path, name: str, record: Any) -> None:
        raise manifest.DamagedError(name, "is missing")

    with patch.object(manifest, "check_file", checking):
        yield


def only_rank_1(context: Any) -> Any:
    return context if RANK == 1 else nullcontext()


def free_port(file: Path) -> str:
    """Rank 0 chooses the port only when it is needed, so that no other process takes it in between."""
    if RANK == 0:
        part = file.with_suffix(".part")
        part.write_text(str(net.free_port()))
        part.rename(file)
    while not file.exists():
        time.sleep(0.02)
    return file.read_text()


def main(root: Path) -> None:
    ended: dict[str, dict[str, str]] = {}

    def run(name: str, folder: str, *overrides: str, on_rank_1: Any = None) -> None:
        os.environ["MASTER_PORT"] = free_port(root / f"port_{len(ended)}")
        model = f"model.path={root / 'model'}"
        common = ["eval.problems=1", "eval.interval=0", "eval.control_problems=0", "rollout.tasks_per_step=2",
                  "rollout.episodes_per_task=2", "algo.on_no_signal=train", "algo.max_resamples=0",
                  "actor.tensor_parallel=2", "launch.device=cpu", "warm_start.steps=0", "steps=4"]  # fmt: skip
        settings = load("rulebook_easy", [model, f"run_dir={root / folder}", *common, *overrides])
        said, how = io.StringIO(), "done"
        with contextlib.redirect_stderr(said), only_rank_1(on_rank_1 or nullcontext()):
            try:
                train.main(settings)
            except (Exception, KeyboardInterrupt) as error:
                how = f"{type(error).__name__}: {error}"
        ended[name] = {"how": how, "said": " ".join(said.getvalue().split())}
        (root / f"ended_{RANK}.json").write_text(json.dumps(ended))

    run("whole", "whole", ALWAYS, "checkpoint.keep=9")
    run("engine", "engine", NEVER, on_rank_1=fault("engine@2"))
    run("engine again", "engine", NEVER)
    with poisoned():
        run("poisoned", "poisoned", ALWAYS, "checkpoint.keep=1")
    run("poisoned again", "poisoned", ALWAYS, "checkpoint.keep=1")
    run("full", "full", ALWAYS, "checkpoint.keep=2", on_rank_1=no_large_files())
    left = sorted(p.name for p in (root / "full" / "checkpoints").iterdir())
    run("full again", "full", ALWAYS, "checkpoint.keep=2")
    run("blind", "full", ALWAYS, "checkpoint.keep=2", "steps=5", on_rank_1=blind())
    if RANK == 0:
        (root / "left.json").write_text(json.dumps(left))
        damaged = root / "full" / "checkpoints" / "step_000004" / "rank_00001_0000.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
    run("damaged", "full", ALWAYS, "checkpoint.keep=2", "steps=4")
    with patch.multiple(saving, WAIT_S=2.0, HURRIED_WAIT_S=2.0):
        run("alone", "alone", NEVER, on_rank_1=fault("score@2"))


if __name__ == "__main__":
    main(Path(sys.argv[3]))
