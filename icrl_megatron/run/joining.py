"""How a rank joins its run: process group, lock of the run folder, and a check that all ranks see the folder."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed import job_size, platform
from icrl_megatron.distributed.grid import any_rank
from icrl_megatron.distributed.process import report_started
from icrl_megatron.engines.engine_ranks import EngineRanks
from icrl_megatron.settings.loading import run_folder
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.disk import disk_errors
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.files import locked

RANK_LOCK = ".lock"
SEEN_TIMEOUT_S = 60.0
"""Network file systems may show a new file late."""


@contextmanager
def joined(settings: Settings) -> Iterator[grids.Grid]:
    """This rank's grid, while the job holds its run folder. Raises ConfigError if this machine has too few GPUs for
    ranks and engines."""
    platform.prepare(settings.launch.device)
    if settings.launch.engine_ranks and platform.device().type == "cuda":  # a warm start does not need these GPUs yet
        EngineRanks.of(settings, job_size.ranks_on_node(settings)).require_gpus(torch.cuda.device_count())
    grids.single_process()
    grid = grids.build(settings)
    try:
        # The launcher has its own lock. This one is for ranks that outlive it for a moment, or have no launcher.
        with locked(run_folder(settings), RANK_LOCK) if grid.rank == 0 else nullcontext():
            if grid.rank == 0:
                report_started()
            require_shared(run_folder(settings), grid)
            yield grid
    finally:
        grids.shutdown()


def require_shared(folder: Path, grid: grids.Grid) -> None:
    """Raises ConfigError on all ranks if one of them does not see a file that rank 0 wrote to the run folder."""
    token = folder / f".seen.{grids.gather_objects(grid, secrets.token_hex(8))[0]}"
    if grid.rank == 0:
        with disk_errors(token, "a file that the other ranks look for"):
            token.touch()
    any_rank(grid, False)  # a barrier: a network file system may cache that a file did not exist
    deadline = time.monotonic() + float(os.environ.get("ICRL_SEEN_TIMEOUT_S", SEEN_TIMEOUT_S))
    while not token.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [name for name in grids.gather_objects(grid, "" if token.exists() else socket.gethostname()) if name]
    if grid.rank == 0:
        token.unlink(missing_ok=True)
    if blind:
        raise ConfigError(
            f"run_dir={folder}: {blind[0]} does not see what the first node wrote there; use a folder on a file "
            "system that all nodes share, run_dir=..."
        )
