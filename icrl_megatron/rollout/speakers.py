"""The sources of replies in an episode: an engine, or an empty critic. (`teacher.py` has the scripted one.)"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from icrl_megatron.engines.protocol import Engine, Sampling
from icrl_megatron.types import Completion, Ids, Role, Task, id_array, logprob_array


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
    """The critique that the solver reads in this round; None in round 0 and for critiques."""
    message: str = ""
    """The critic's whole prompt as text, for a critic that is not an engine; empty for the solver."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply (`Dialogue.stop`)."""


class Speaker(Protocol):
    async def reply(self, ask: Ask) -> Completion: ...


@runtime_checkable
class Interruptible(Protocol):
    """A speaker whose replies can be cut short."""

    async def interrupt(self) -> None:
        """Ends the replies in flight and those requested later in the same event loop. Each returns what it has, with
        finish reason "abort"."""
        ...


@dataclass(frozen=True)
class Speakers:
    """The speakers of one episode; in ICRL's training, both are the same."""

    solver: Speaker
    critic: Speaker


SpeakersFor = Callable[[Task, int], Speakers]
"""(task, episode index) -> its speakers. Engines serve every episode; a teacher plays only one."""


@dataclass(frozen=True)
class EngineSpeaker:
    """A model behind an engine."""

    engine: Engine
    temperature: float
    stop_ids: Ids

    async def reply(self, ask: Ask) -> Completion:
        sampling = Sampling(self.temperature, ask.max_new_tokens, ask.seed, self.stop_ids, ask.stop)
        return await self.engine.generate(ask.prompt_ids, sampling)

    async def interrupt(self) -> None:
        await self.engine.interrupt()


@dataclass(frozen=True)
class EmptyCritic:
    """A control: a critic that generates no tokens."""

    async def reply(self, ask: Ask) -> Completion:
        return Completion(id_array(()), logprob_array(()), "stop", 0)


def same_speakers(solver: Speaker, critic: Speaker | None = None) -> SpeakersFor:
    """The same speakers for every episode; without a critic, the solver criticizes itself."""
    speakers = Speakers(solver, critic or solver)
    return lambda task, index: speakers


@dataclass
class Meter:
    """Counts the tokens that speakers generate, used or not."""

    tokens: int = 0

    def on(self, speakers_for: SpeakersFor) -> SpeakersFor:
        """The same speakers, with their tokens counted."""

        def speakers_of(task: Task, index: int) -> Speakers:
            speakers = speakers_for(task, index)
            return Speakers(_Metered(speakers.solver, self), _Metered(speakers.critic, self))

        return speakers_of


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
    """Derives the seed of every random choice in a rollout: stable over processes, machines and order of arrival."""

    run: int
    step: int
    purpose: str = "train"
    """Separates rollouts of one step: train, eval, control, sft, ..."""

    def of(self, task_id: str, index: int, round: int, role: str, turn: int) -> int:
        """A seed in [0, 2**63) for one request."""
        key = repr((self.run, self.step, self.purpose, task_id, index, round, role, turn))
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
