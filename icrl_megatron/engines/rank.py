"""The engines of one rank and the rank's share of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from icrl_megatron.engines.protocol import Engine, EngineStats, Served, WeightReceiver
from icrl_megatron.engines.server_group import ServerGroup


@dataclass(frozen=True)
class Share:
    """Which tasks a rank plays: every `count`-th, starting at `index`."""

    index: int | None
    """None on a rank that generates nothing."""
    count: int


ONE_RANK = Share(0, 1)
"""All tasks."""


@dataclass(frozen=True)
class Engines:
    """The engines of one rank."""

    trained: WeightReceiver
    """Receives weights."""
    solver: Engine | None
    """The same engine on a rank that generates; None on other ranks."""
    frozen: Engine | None
    """A second engine whose weights never change: the critic of `rollout.critic=frozen`, or of `icrl eval --critic`."""
    share: Share
    in_turn: bool = False
    """Servers start one after another, and each sleeps once it is ready. A server sizes its cache by the free GPU
    memory at startup, so nothing else may use the GPU then. The same on every rank."""
    group: ServerGroup = field(default_factory=ServerGroup)
    """The ranks whose GPUs this rank's server uses."""

    def _served(self) -> list[Served]:
        engines: tuple[object, ...] = (self.solver, self.frozen)
        return [engine for engine in engines if isinstance(engine, Served)]

    def start(self) -> None:
        """Starts the servers of this rank without waiting for them."""
        for engine in self._served():
            engine.start()

    def wait_ready(self, tick: Callable[[], None] = lambda: None) -> None:
        """Returns when every server of this rank is ready. Servers that start `in_turn` are started here and then put
        to sleep. Raises EngineError with the end of the log of a server that does not become ready."""
        for engine in self._served():
            if self.in_turn:
                engine.start()
            engine.wait_ready(tick)
            if self.in_turn:
                engine.sleep()

    def wake(self) -> None:
        """Wakes engines that keep their weights and get no others (`icrl eval`)."""
        for engine in self._served() if self.in_turn else ():
            engine.wake_weights()
            engine.wake()

    def lost(self) -> str:
        """Why an engine of this rank has to be restarted; empty if none has to."""
        return next(filter(None, (engine.lost() for engine in self._served())), "")

    def revive(self) -> bool:
        """Restarts the lost engines of this rank's group. Returns True on every rank of the group if the trained engine
        then needs the current weights, which all these ranks must send. Raises EngineError on every rank of the
        group."""
        return self.group.of_lead(self._revive)

    def _revive(self) -> bool:
        stale = isinstance(self.solver, Served) and bool(self.solver.lost())
        for engine in self._served():
            if engine.lost():
                engine.revive()
        return stale

    def take_stats(self) -> EngineStats:
        """Returns the counters of this rank's engines since the last call."""
        taken = [engine.take_stats() for engine in self._served()]
        return sum(taken, EngineStats())

    def close(self) -> None:
        for engine in (self.solver, self.frozen):
            if engine is not None:
                engine.close()


def lead_rank(rank: int, world: int, servers: int) -> int:
    """The rank that leads the server of `rank`'s group. Ranks are split into one group of consecutive ranks per server,
    and the first rank of a group leads."""
    size = world // servers
    return rank // size * size
