"""Who writes the replies of an episode: an engine, or an empty critic. (`teacher.py` has the scripted one.)"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from icrl_megatron.engines.protocol import Engine, Sampling
from icrl_megatron.types import Completion, Ids, Role, Task


@dataclass(frozen=True)
class Ask:
    """One request for a reply. Engines read the ids; scripted speakers read the texts."""

    role: Role
    prompt_ids: Ids
    max_new_tokens: int
    seed: int
    text: str
    """The newest observation, or the summary of the failed attempt for a critique."""
    critique: str | None
    """What the solver was told in this round; None in round 0 and for critiques."""
    message: str = ""
    """All that a critic reads, as text, for one that is not behind an engine; empty for the solver."""


class Speaker(Protocol):
    async def reply(self, ask: Ask) -> Completion: ...


@runtime_checkable
class Interruptible(Protocol):
    """A speaker whose replies take long, and can be cut short."""

    async def interrupt(self) -> None:
        """Ends the replies in flight, and those that are asked for later in the same event loop: each returns what it
        has, with "abort" as its reason."""
        ...


@dataclass(frozen=True)
class Cast:
    """The speakers of one episode; they may be the same, and in ICRL's training they are."""

    solver: Speaker
    critic: Speaker


Casting = Callable[[Task, int], Cast]
"""(task, episode index) -> its speakers: engines serve every episode, a teacher plays only one."""


@dataclass(frozen=True)
class EngineSpeaker:
    """A model behind an engine."""

    engine: Engine
    temperature: float
    stop_ids: Ids

    async def reply(self, ask: Ask) -> Completion:
        sampling = Sampling(self.temperature, ask.max_new_tokens, ask.seed, self.stop_ids)
        return await self.engine.generate(ask.prompt_ids, sampling)

    async def interrupt(self) -> None:
        await self.engine.interrupt()


@dataclass(frozen=True)
class EmptyCritic:
    """A control: a critic that says nothing, and generates no token."""

    async def reply(self, ask: Ask) -> Completion:
        return Completion((), (), "stop", 0)


def engine_casting(solver: Speaker, critic: Speaker | None = None) -> Casting:
    """The same speakers for every episode; without a critic the solver criticises itself."""
    cast = Cast(solver, critic or solver)
    return lambda task, index: cast


@dataclass
class Meter:
    """Counts what speakers generate, whatever becomes of it."""

    tokens: int = 0

    def on(self, casting: Casting) -> Casting:
        """The same speakers, counted."""

        def cast(task: Task, index: int) -> Cast:
            speakers = casting(task, index)
            return Cast(_Metered(speakers.solver, self), _Metered(speakers.critic, self))

        return cast


@dataclass(frozen=True)
class _Metered:
    speaker: Speaker
    meter: Meter

    async def reply(self, ask: Ask) -> Completion:
        completion = await self.speaker.reply(ask)
        self.meter.tokens += len(completion.ids)
        return completion

    async def interrupt(self) -> None:
        if isinstance(self.speaker, Interruptible):
            await self.speaker.interrupt()


@dataclass(frozen=True)
class Seeds:
    """Where every random choice of a rollout comes from: stable over processes, machines and order of arrival."""

    run: int
    step: int
    purpose: str = "train"
    """Keeps rollouts of one step apart: train, eval, control, sft, ..."""

    def of(self, task_id: str, index: int, round: int, role: str, turn: int) -> int:
        """A seed in [0, 2**63) for one request."""
        key = repr((self.run, self.step, self.purpose, task_id, index, round, role, turn))
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
