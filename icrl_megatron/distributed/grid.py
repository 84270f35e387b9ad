"""The TP x CP x PP x DP grid of ranks, and the trainer's collectives on host objects."""

from __future__ import annotations

import datetime
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from icrl_megatron.distributed import platform, rendezvous
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError, HopelessError

T = TypeVar("T")

SHARE_TIMEOUT_S = 86400.0
"""Minimum timeout of collectives between ranks without a model."""
GATHER_BYTES = 64 << 20
"""Most bytes of all ranks together in a round of `gather_bytes`."""


@dataclass(frozen=True)
class Grid:
    """This rank's position. Ranks of a tensor-parallel group are consecutive, then come context-parallel ranks;
    pipeline stages are furthest apart."""

    rank: int
    world: int
    tensor: int
    tensor_rank: int
    pipeline: int
    pipeline_rank: int
    data: int
    data_rank: int
    host_group: Any
    """A gloo group of all ranks, for Python objects and token sequences."""
    context: int = 1
    context_rank: int = 0

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    def replica_ranks(self, replica: int) -> tuple[int, ...]:
        """The ranks of a data-parallel replica in ascending order, stage by stage (Megatron's order: those of a stage
        are consecutive)."""
        stage = self.tensor * self.context
        return tuple(r + stage * (replica + self.data * p) for p in range(self.pipeline) for r in range(stage))

    def scoring_rank(self, replica: int) -> int:
        """The rank of a replica that reports what its last stage measured."""
        return self.replica_ranks(replica)[-self.tensor * self.context]

    @property
    def reports(self) -> bool:
        """Whether this rank alone counts the samples of its replica and stage: all ranks there have the same ones."""
        return self.tensor_rank == 0 and self.context_rank == 0


def build(settings: Settings) -> Grid:
    """Joins the process group and Megatron's parallel state, using RANK, WORLD_SIZE and MASTER_*."""
    from megatron.core import parallel_state, tensor_parallel

    timeout = datetime.timedelta(seconds=settings.launch.timeout_s)
    _join(settings, platform.backend(), timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.actor.tensor_parallel,
        pipeline_model_parallel_size=settings.actor.pipeline_parallel,
        context_parallel_size=settings.actor.context_parallel,
        distributed_timeout_minutes=max(1, round(settings.launch.timeout_s / 60)),
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(settings.seed + 1)
    return Grid(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        host_group=dist.new_group(backend="gloo", timeout=timeout),
        context=parallel_state.get_context_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
    )


def _join(settings: Settings, backend: str, timeout: datetime.timedelta) -> None:
    if not dist.is_initialized():
        rendezvous.keep_to_this_machine(settings.engine)
        dist.init_process_group(
            backend,
            store=rendezvous.store(timeout),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
        )


def without_model(settings: Settings) -> Grid:
    """The grid of a rank without a part of a model: such ranks only exchange Python objects. A single rank needs no
    process group, and its grid has no `host_group`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Grid(0, 1, 1, 0, 1, 0, 1, 0, None)
    # The agent ends all ranks when one dies. Their shares may take very different times, so the timeout is long.
    timeout = datetime.timedelta(seconds=max(settings.launch.timeout_s, SHARE_TIMEOUT_S))
    _join(settings, "gloo", timeout)
    rank = dist.get_rank()
    return Grid(rank, world, 1, 0, 1, 0, world, rank, dist.new_group(backend="gloo", timeout=timeout))


def single_process() -> None:
    """Sets the environment of a one-rank job, for programs that were not started as ranks (tools, tests)."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)


def shutdown() -> None:
    """Leaves Megatron's parallel state and the process group."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_bytes(grid: Grid, mine: bytes) -> list[bytes]:
    """All ranks' bytes, in rank order, on every rank. A round moves at most GATHER_BYTES to each rank."""
    sizes = torch.zeros(grid.world, dtype=torch.int64)
    dist.all_gather([*sizes.split(1)], torch.tensor([len(mine)]), group=grid.host_group)
    piece, longest = max(1, GATHER_BYTES // grid.world), int(sizes.max())
    parts: list[list[bytes]] = [[] for _ in range(grid.world)]
    for begin in range(0, longest, piece):
        width = min(piece, longest - begin)
        padded = np.zeros(width, dtype=np.uint8)
        chunk = mine[begin : begin + width]
        padded[: len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
        everyone = torch.empty(grid.world * width, dtype=torch.uint8)
        dist.all_gather([*everyone.split(width)], torch.from_numpy(padded), group=grid.host_group)
        for rank, of in enumerate(everyone.numpy().reshape(grid.world, width)):
            parts[rank].append(of[: max(0, int(sizes[rank]) - begin)].tobytes())
    return [b"".join(of) for of in parts]


def gather_objects(grid: Grid, mine: Any) -> list[Any]:
    """All ranks' objects, in rank order, on every rank. For small objects: every rank gets all of them."""
    return [pickle.loads(of) for of in gather_bytes(grid, pickle.dumps(mine))]


class OtherRankError(RuntimeError):
    """Another rank failed; the message says which one and contains its traceback."""


@dataclass(frozen=True)
class Failure:
    """An exception of one rank as text, which can be sent to other ranks whatever its type."""

    kind: type[ConfigError] | type[HopelessError] | type[OtherRankError]
    message: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        for kind in (ConfigError, HopelessError):
            if isinstance(error, kind):
                return Failure(kind, str(error))
        return Failure(OtherRankError, "".join(traceback.format_exception(error)))


def raise_failures(mine: BaseException | None, everyone: Sequence[Failure | None]) -> None:
    """Raises this rank's own exception, or else the first failure of another rank; nothing if no rank failed."""
    if mine is not None:
        raise mine
    for rank, failure in enumerate(everyone):
        if failure is not None:
            prefix = f"rank {rank} failed: " if failure.kind is OtherRankError else ""
            raise failure.kind(prefix + failure.message)


def run_on_all_ranks(grid: Grid, work: Callable[[], T]) -> T:
    """Runs `work`, which must not communicate, on every rank. Returns its result when all ranks are done.

    If it fails on any rank, all ranks raise: a rank whose own work failed raises its own exception, the others raise
    the same ConfigError or HopelessError, or OtherRankError for any other exception. So no rank waits for a failed one.
    """
    done, failed = attempt(work)
    raise_failures(failed, gather_objects(grid, None if failed is None else Failure.of(failed)))
    return done  # type: ignore[return-value]  # raise_failures raises if there is no result


def gather_results(gather: Callable[[Any], list[Any]], work: Callable[[], T]) -> tuple[T, list[T]]:
    """The result of `work` on this rank, and those of all ranks. Raises on all ranks if it fails on one, as
    `run_on_all_ranks`."""
    done, failed = attempt(work)
    everyone = gather((done, None if failed is None else Failure.of(failed)))
    raise_failures(failed, [failure for _, failure in everyone])
    results: list[T] = [result for result, _ in everyone]
    return done, results  # type: ignore[return-value]  # raise_failures raises if there is no result


def attempt(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """The result of `work`, or the exception that it raised."""
    try:
        return work(), None
    except (Exception, KeyboardInterrupt) as error:
        return None, error


def barrier(grid: Grid, name: str, timeout_s: Callable[[], float]) -> bool:
    """Waits until every rank has called this with the same `name`; False if one has not after `timeout_s()` seconds.

    Uses the rendezvous store, so it works while another rank hangs in a collective. `timeout_s` is called repeatedly,
    so its value may change during the wait.
    """
    store, begun = _get_default_store(), time.monotonic()
    store.set(f"{name}/{grid.rank}", "")
    everyone = [f"{name}/{rank}" for rank in range(grid.world)]
    while not store.check(everyone):
        if time.monotonic() - begun > timeout_s():
            return False
        time.sleep(0.05)
    return True


def any_rank(grid: Grid, flag: bool) -> bool:
    """True on all ranks if it is True on any, so that a signal to one rank stops all of them at the same step."""
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=grid.host_group)
    return bool(value.item())


def sum_over_ranks(grid: Grid, values: dict[str, float]) -> dict[str, float]:
    """Sums by key over all ranks; every rank passes the same keys."""
    names = sorted(values)
    total = torch.tensor([values[n] for n in names], dtype=torch.float64)
    dist.all_reduce(total, group=grid.host_group)
    return dict(zip(names, total.tolist(), strict=True))
