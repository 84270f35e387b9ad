"""The ranks on whose GPUs one SGLang server runs: what its leader learns of it, all of them must know."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from icrl_megatron.engines.protocol import EngineError


@dataclass(frozen=True)
class ServerGroup:
    """All its ranks make the same calls in the same order. The defaults are a rank that shares no GPU with a server of
    another."""

    handle: Any = None
    """A gloo group; None for a single rank."""
    lead: int = 0
    """The rank, of all, that leads the server."""
    timeout_s: float = 1800.0

    def meet(self) -> None:
        """Returns once every rank has called it: a GPU's memory is taken only after it was released.

        Raises EngineError when one does not come in time.
        """
        if self.handle is None:
            return
        try:
            dist.monitored_barrier(self.handle, datetime.timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise EngineError(f"A rank that shares an SGLang server did not respond: {error}") from error

    def of_lead(self, do: Callable[[], bool]) -> bool:
        """What `do` returns on the rank that leads, or the EngineError it raises there, on every rank."""
        if self.handle is None:
            return do()
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
