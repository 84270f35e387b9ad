"""The ranks of the tests of context parallelism: `python context_worker.py FOLDER` forks them after its imports, which
take longer than the tests, and runs all layouts of `CONTEXT_LAYOUTS`. Rank 0 writes the results to FOLDER.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from grid_cases import CASES, CONTEXT_LAYOUTS
from grid_worker import load_checkpoints, refuse, save_checkpoints, train
from megatron.core import parallel_state

from icrl_megatron.distributed import grid as grids
from icrl_megatron.distributed import net
from icrl_megatron.distributed.process import STORE_FD_ENV

RANKS = 8
TRAINED = {"cp2": ("everything", "sparse_gspo"), "tp2cp2sp": ("gspo",), "tp2cp2pp2sp": ("everything",)}
"""Cases of each layout."""
SAVER, LOADER = "tp2cp2pp2sp", "cp2"
REFUSING = "tp2cp2sp"


def run(root: Path) -> None:
    torch.set_num_threads(1)
    for name in sorted(CONTEXT_LAYOUTS, key=lambda n: n != SAVER):
        layout, out = CONTEXT_LAYOUTS[name], root / name
        out.mkdir(exist_ok=True)
        grid = grids.build(CASES["paper"].settings(layout))
        for case in TRAINED[name]:
            found = train(CASES[case], layout, grid, root)
            if grid.rank == 0:
                torch.save(found, out / f"{case}.pt")
        if name == SAVER:
            save_checkpoints(name, layout, grid, root, ["fp32"])
        if name == LOADER:
            load_checkpoints(name, layout, grid, root, out)
        if name == REFUSING:
            refused = grids.gather_objects(grid, refuse(layout, grid, root))
            if grid.rank == 0:
                torch.save(refused, out / "refused.pt")
        dist.barrier(group=grid.host_group)
        parallel_state.destroy_model_parallel()
    grids.shutdown()


def main(root: Path) -> int:
    """Returns 1 if a rank failed; the others are then ended."""
    socket = net.bound("127.0.0.1", 0)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(socket.getsockname()[1]))
    os.environ.update(WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS), **{STORE_FD_ENV: str(socket.detach())})
    ranks = {fork(rank, root) for rank in range(RANKS)}
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return int(failed)


def fork(rank: int, root: Path) -> int:
    """The process id of a new rank."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        run(root)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
