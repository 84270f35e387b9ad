"""The ranks that share one server's GPUs, and the collectives that keep them in agreement about it."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from icrl_megatron.engines.protocol import EngineError

if TYPE_CHECKING:
    from icrl_megatron.distributed.grid import Grid


@dataclass(frozen=True)
class ServerGroup:
    """All ranks of the group make the same calls in the same order. The defaults are for a rank that shares no
    server."""

    handle: Any = None
    """A gloo group; None for a single rank."""
    lead: int = 0
    """Global rank that leads the server."""
    timeout_s: float = 1800.0

    @staticmethod
    def of(grid: Grid, servers: int, timeout_s: float) -> ServerGroup:
        """This rank's group, if consecutive ranks share one of `servers` servers. Collective over all ranks."""
        import torch.distributed as dist  # lazy, so that engine kinds can be imported without torch

        size, mine = grid.world // servers, None
        for first in range(0, grid.world, size) if size > 1 else ():
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
            mine = group if grid.rank in ranks else mine
        return ServerGroup(mine, grid.rank // size * size, timeout_s)

    def barrier(self) -> None:
        """Returns once every rank has called it, so that GPU memory is taken only after it was released.

        Raises EngineError on timeout.
        """
        if self.handle is None:
            return
        import torch.distributed as dist

        try:
            dist.monitored_barrier(self.handle, datetime.timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise EngineError(
                f"A rank that shares a server did not come within {self.timeout_s:g} s: {error}"
            ) from error

    def of_lead(self, do: Callable[[], bool]) -> bool:
        """Runs `do` on the leading rank; returns its result, or raises its EngineError, on every rank."""
        if self.handle is None:
            return do()
        import torch.distributed as dist

        found: list[bool | EngineError] = [False]
        if dist.get_rank() == self.lead:
            try:
                found = [do()]
            except EngineError as error:
                found = [error]
        dist.broadcast_object_list(found, src=self.lead, group=self.handle)
        if isinstance(found[0], EngineError):
            raise found[0]
        return found[0]
