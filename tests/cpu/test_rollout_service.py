"""The rollout service in this process, on real engines: updates, restarts and checkpoints while groups are played."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from ladder import SETTINGS, VOCABULARY, Ladder, ladder, ladder_prompter
from safetensors.torch import load_file

from icrl_megatron.engines.continuing import ContinuingEngine
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.protocol import EngineError, EngineLostError, EngineStats, Sampling
from icrl_megatron.engines.rank import ONE_RANK, Engines
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.rollout import service
from icrl_megatron.rollout.episode import EpisodeSetup
from icrl_megatron.rollout.messages import (
    Asleep,
    Begin,
    EngineLost,
    FromService,
    GroupEnded,
    Heartbeat,
    Probed,
    Save,
    SavedGroups,
    Sleep,
    ToService,
    Update,
    Updated,
)
from icrl_megatron.rollout.open_group import OpenGroup
from icrl_megatron.rollout.probe import PROBE_REPLIES, PROBE_TOKENS
from icrl_megatron.rollout.replay import tokens
from icrl_megatron.rollout.service import GroupSetup, RolloutService
from icrl_megatron.rollout.speakers import EngineSpeaker, same_speakers
from icrl_megatron.settings.schema import EngineSettings, TinyModel
from icrl_megatron.types import Completion, Episode

LIMIT_S = 40.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Version 1, version 2, ..."""
    made = [tmp_path_factory.mktemp(f"model{seed}") for seed in range(3)]
    for seed, path in enumerate(made):
        build_tiny(path, TinyModel(hidden=32, ffn=64, head_dim=8), VOCABULARY, seed)
    return made


class Mortal(LocalEngine):
    """Dies or cancels requests when told to; a restart takes a moment, and then it has the weights of its folder."""

    died = ""
    cancels = False
    revivals = 0

    async def generate(self, prompt_ids: object, sampling: Sampling) -> Completion:
        if self.died:
            raise EngineLostError(self.died)
        if self.cancels:
            raise asyncio.CancelledError
        return await super().generate(prompt_ids, sampling)  # type: ignore[arg-type]

    def start(self) -> None: ...

    def wait_ready(self, tick: Callable[[], None]) -> None: ...

    def lost(self) -> str:
        return self.died

    def revive(self) -> None:
        time.sleep(0.2)
        self._version = 0
        self.died, self.revivals = "", self.revivals + 1

    def take_stats(self) -> EngineStats:
        return EngineStats()


@dataclass
class Stop:
    asked: bool = False


@dataclass
class Talk:
    """A trainer's side of the messages."""

    service: RolloutService
    engine: Mortal
    heard: list[FromService] = field(default_factory=list)
    installing: Callable[[], None] = lambda: None
    serving: asyncio.Future[None] | None = None

    def say(self, message: ToService) -> None:
        self.service.receive(message)

    def of(self, kind: type[FromService]) -> list[FromService]:
        return [message for message in self.heard if isinstance(message, kind)]

    async def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, self.heard[-5:]
            await asyncio.sleep(0.005)

    async def plays(self, *numbers: int) -> None:
        """Sends the first weights, and returns when these groups have generated some tokens."""
        self.say(Update(1, ()))
        self.say(begin(*numbers))
        await self.until(lambda: self.service._meter.tokens > 4)

    def ended(self) -> dict[int, GroupEnded]:
        return {message.number: message for message in self.heard if isinstance(message, GroupEnded)}


@asynccontextmanager
async def talking(folders: list[Path], frozen: Mortal | None = None, staleness: int = 1) -> AsyncIterator[Talk]:
    engine = Mortal(folders[0], EngineSettings(), torch.float32, "cpu")
    prompter = ladder_prompter()
    solver = ContinuingEngine(engine, prompter.before_stop)
    engines = Engines(engine, engine, frozen, ONE_RANK)
    speaker = EngineSpeaker(solver, 1.0, prompter.stop_ids)
    critic = None if frozen is None else EngineSpeaker(frozen, 1.0, prompter.stop_ids)
    setup = EpisodeSetup(Ladder, prompter, SETTINGS)
    playing = GroupSetup(setup, same_speakers(speaker, critic), 0, 2, staleness)

    def install(update: Update) -> None:
        talk.installing()
        weights = load_file(folders[(update.version - 1) % len(folders)] / "model.safetensors")
        engine.update_weights(weights.items(), update.version)
        engine.wake()

    heard: list[FromService] = []
    talk = Talk(RolloutService(engines, solver, playing, install, Stop()), engine, heard)
    serving = talk.serving = asyncio.ensure_future(talk.service.serve(heard.append))
    try:
        yield talk
        talk.say(None)  # type: ignore[arg-type]
        await asyncio.wait_for(serving, LIMIT_S)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def begin(*numbers: int) -> Begin:
    return Begin(tuple(OpenGroup(n, ladder(str(n), 9), 20) for n in numbers))  # never succeeds: long episodes


def versions(group: GroupEnded) -> set[int]:
    found = set()
    for episode in group.results:
        assert isinstance(episode, Episode)
        completions = [t.completion for a in episode.attempts for t in a.turns]
        completions += [c.completion for c in episode.critiques]
        for one in completions:
            found |= {one.weight_version, *(version for version, _ in one.older)}
    return found


async def test_groups_are_played_over_updates_and_every_token_is_accounted_for(folders: list[Path]) -> None:
    async with talking(folders, staleness=2) as talk:
        talk.say(begin(0, 1))
        await asyncio.sleep(0.1)
        assert not talk.ended() and not talk.engine._pending, "nothing is generated without weights"
        talk.say(Update(1, ()))
        await talk.until(lambda: talk.service._meter.tokens > 4)
        talk.say(Update(2, ()))
        await talk.until(lambda: len(talk.ended()) == 2)
        found = talk.ended()
        assert {n: of.version for n, of in found.items()} == {0: 0, 1: 0}, "they began before the first weights"
        assert set.union(*map(versions, found.values())) == {1, 2}
        generated = sum(beat.generated for beat in talk.heard if isinstance(beat, Heartbeat))
        assert generated == sum(of.tokens for of in found.values())


async def test_a_lost_engine_serves_only_with_the_current_weights_and_is_sent_them_once(folders: list[Path]) -> None:
    async with talking(folders) as talk:
        talk.say(Update(1, ()))
        await talk.until(lambda: talk.of(Updated))
        talk.say(begin(0, 1, 2))
        await talk.until(lambda: talk.service._meter.tokens > 4)
        talk.engine.died = "It died."
        await talk.until(lambda: isinstance(last := talk.of(Heartbeat)[-1], Heartbeat) and last.needs_weights)
        talk.say(Update(1, ()))
        await talk.until(lambda: len(talk.of(Updated)) == 2)
        last = talk.heard[talk.heard.index(talk.of(Updated)[0]) + 1 :]
        before = [m for m in last[: last.index(Updated(1))] if isinstance(m, Heartbeat)][-1]
        assert not before.needs_weights, "otherwise the trainer would send all weights again"
        await talk.until(lambda: len(talk.ended()) == 3)
        assert set.union(*map(versions, talk.ended().values())) == {1}
        assert sum(beat.deaths for beat in talk.heard if isinstance(beat, Heartbeat)) == 1
        assert talk.of(EngineLost) == [EngineLost("It died.")]


def replies(talk: Talk) -> dict[int, list[Completion]]:
    """The answers to probes by the version that they were sent for."""
    found: dict[int, list[Completion]] = {}
    for probed in talk.of(Probed):
        assert isinstance(probed, Probed)
        for episode in probed.episodes:
            (turn,) = episode.attempts[0].turns
            found.setdefault(probed.version, []).append(turn.completion)
    return found


async def test_every_update_is_probed_before_other_requests_continue(folders: list[Path]) -> None:
    async with talking(folders, staleness=9) as talk:
        talk.say(Update(1, ()))
        talk.say(begin(0))
        await talk.until(lambda: talk.ended() and talk.of(Probed))
        talk.say(begin(1, 2, 3))
        for version in (2, 3, 4):
            tokens_before = talk.service._meter.tokens
            await talk.until(lambda before=tokens_before: talk.service._meter.tokens > before)  # type: ignore[misc]
            talk.say(Update(version, ()))
            await talk.until(lambda version=version: version in replies(talk))  # type: ignore[misc]
            found = replies(talk)[version]
            assert all((of.weight_version, of.older) == (version, ()) and len(of.ids) > 0 for of in found)
            assert len({of.ids.tobytes() for of in found}) > 1, "each has its own seed"
        await talk.until(lambda: len(talk.ended()) == 4)
        assert set(replies(talk)) == {1, 2, 3, 4} and len(talk.of(Probed)) == 4
        generated = sum(beat.generated for beat in talk.heard if isinstance(beat, Heartbeat))
        assert generated == sum(of.tokens for of in talk.ended().values()), "probes are not among the groups' tokens"


async def test_an_engine_that_does_not_answer_a_probe_costs_only_the_probe(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "PROBE_ALONE_S", 0.1)
    async with talking(folders, staleness=9) as talk:
        talk.say(Update(1, ()))
        talk.say(begin(0))
        await talk.until(lambda: talk.ended() and talk.of(Probed))
        answer, hangs = talk.engine.generate, asyncio.Event()

        async def generate(prompt_ids: object, sampling: Sampling) -> Completion:
            if sampling.max_new_tokens == PROBE_TOKENS // PROBE_REPLIES and talk.service._version == 2:
                await hangs.wait()
                raise EngineError("It does not answer.")
            return await answer(prompt_ids, sampling)

        monkeypatch.setattr(talk.engine, "generate", generate)
        talk.say(Update(2, ()))
        talk.say(begin(1))
        await talk.until(lambda: len(talk.ended()) == 2)
        assert versions(talk.ended()[1]) == {2}
        hangs.set()
        talk.say(Update(3, ()))
        await talk.until(lambda: len(talk.of(Probed)) == 2)
        assert set(replies(talk)) == {1, 3}


@pytest.mark.parametrize("which", ["trained", "frozen"])
@pytest.mark.parametrize("first", ["update", "restart"])
async def test_an_update_and_a_restart_that_cross_each_other(folders: list[Path], which: str, first: str) -> None:
    """No request passes while either of them is under way, nor while the engine has its folder's weights."""
    frozen = Mortal(folders[0], EngineSettings(), torch.float32, "cpu")
    async with talking(folders, frozen) as talk:
        talk.say(Update(1, ()))
        await talk.until(lambda: talk.of(Updated))
        talk.say(begin(0, 1, 2))
        await talk.until(lambda: talk.service._meter.tokens > 4)
        dies = talk.engine if which == "trained" else frozen
        if first == "update":
            talk.installing = lambda: (setattr(dies, "died", "It died."), time.sleep(0.2))  # type: ignore[assignment]
        else:
            dies.died = "It died."
            await talk.until(lambda: talk.service._changing)
        talk.say(Update(2, ()))
        await talk.until(lambda: len(talk.of(Updated)) == 2)
        talk.installing = lambda: None
        await talk.until(lambda: dies.revivals == 1)
        await talk.until(lambda: not talk.service._changing)
        if first == "update" and which == "trained":
            await talk.until(lambda: isinstance(last := talk.of(Heartbeat)[-1], Heartbeat) and last.needs_weights)
            talk.say(Update(2, ()))
        await talk.until(lambda: len(talk.ended()) == 3)
        solver = {
            turn.completion.weight_version
            for group in talk.ended().values()
            for episode in group.results
            for attempt in episode.attempts  # type: ignore[union-attr]
            for turn in attempt.turns
        }
        assert solver <= {1, 2}, "a restarted engine has version 0 before it is sent weights"


async def test_a_sleeping_engine_generates_nothing_until_the_next_update(folders: list[Path]) -> None:
    async with talking(folders, staleness=2) as talk:
        await talk.plays(0, 1)
        talk.say(Sleep())
        await talk.until(lambda: talk.of(Asleep))
        generated = talk.service._meter.tokens
        talk.say(begin(2))
        with pytest.raises(EngineError, match="sleeps"):
            await talk.engine.generate((1,), Sampling(1.0, 1, 0, ()))
        await asyncio.sleep(0.1)
        assert talk.service._meter.tokens == generated and not talk.ended()
        talk.say(Update(2, ()))
        await talk.until(lambda: len(talk.ended()) == 3)
        assert set.union(*map(versions, talk.ended().values())) == {1, 2}, "episodes went on where they were"


@pytest.mark.parametrize("dies", ["before it sleeps", "while it sleeps"])
async def test_an_engine_is_not_restarted_while_the_actor_has_its_memory(folders: list[Path], dies: str) -> None:
    async with talking(folders, staleness=2) as talk:
        await talk.plays(0, 1)
        if dies == "before it sleeps":
            talk.engine.died = "It died."
        talk.say(Sleep())
        await talk.until(lambda: talk.of(Asleep))
        talk.engine.died = "It died."
        await asyncio.sleep(0.3)
        revived, begun = talk.engine.revivals, len(talk.heard)
        await asyncio.sleep(0.3)
        assert talk.engine.revivals == revived
        talk.say(Update(2, ()))
        await talk.until(lambda: talk.engine.revivals == revived + 1)
        await talk.until(lambda: any(isinstance(m, Heartbeat) and m.needs_weights for m in talk.heard[begun:]))
        talk.say(Update(2, ()))
        await talk.until(lambda: len(talk.ended()) == 2)
        assert set.union(*map(versions, talk.ended().values())) <= {1, 2}


async def test_what_is_saved_does_not_change_while_it_is_sent_and_begins_again_elsewhere(folders: list[Path]) -> None:
    async with talking(folders, staleness=2) as talk:
        await talk.plays(0, 1)
        talk.say(Save())
        await talk.until(lambda: talk.of(SavedGroups))
        (saved,) = talk.of(SavedGroups)
        sent = pickle.dumps(saved)
        await talk.until(lambda: len(talk.ended()) == 2)
        again = pickle.loads(sent)
        assert again == saved, "episodes went on meanwhile"
    async with talking(folders, staleness=2) as talk:
        talk.say(Update(3, ()))
        kept = sum(tokens({group.task: group.logs}) for group in again.groups)
        talk.say(Begin(again.groups))
        await talk.until(lambda: len(talk.ended()) == 2)
        found = talk.ended()
        assert {of.version for of in found.values()} == {1}
        generated = sum(beat.generated for beat in talk.heard if isinstance(beat, Heartbeat))
        assert kept > 0 and generated == sum(of.tokens for of in found.values()) - kept


async def test_a_request_that_the_engine_cancels_ends_the_service(folders: list[Path]) -> None:
    """Otherwise its group would never end, and the trainer would wait for it without a limit."""
    with pytest.raises(EngineError, match="canceled"):
        async with talking(folders) as talk:
            talk.say(Update(1, ()))
            talk.engine.cancels = True
            talk.say(begin(0))
            serving = talk.serving
            await talk.until(lambda: serving is not None and serving.done())
