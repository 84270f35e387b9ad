"""Rollouts whose engine is lost: unfinished episodes are replayed, finished ones are kept."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass, field

import pytest
from rich.console import Console

from icrl_megatron.engines.protocol import EngineError, EngineLostError, EngineStats, RequestFailedError
from icrl_megatron.engines.rank import Share, lead_rank
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.episode import EpisodeSetup
from icrl_megatron.rollout.played import Played, RolloutRequest
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.source import MAX_DEATHS, EngineSource
from icrl_megatron.rollout.speakers import Ask, Seeds, same_speakers
from icrl_megatron.run.control import ControlResult, ControlState, control
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks import registry
from icrl_megatron.types import Completion
from icrl_megatron.utils.progress import Progress

TASKS = list(registry.get("household").problems("train"))[:3]
EPISODES = 2


@dataclass
class Mortal:
    """One rank's engines and their speaker: lost at the given requests, counted from 0."""

    prompter: Prompter
    dies_at: frozenset[int] = frozenset()
    fails_at: frozenset[int] = frozenset()
    share: Share = field(default_factory=lambda: Share(0, 1))
    solver: None = None
    requests: int = 0
    dead: str = ""
    revived: int = 0

    async def reply(self, ask: Ask) -> Completion:
        if self.dead:
            raise EngineLostError(self.dead)
        number, self.requests = self.requests, self.requests + 1
        if number in self.dies_at:
            self.dead = f"died at request {number}"
            raise EngineLostError(self.dead)
        if number in self.fails_at:
            raise RequestFailedError(f"request {number} failed")
        ids = self.prompter.encode_reply("look")
        return Completion(ids, (-1.0,) * len(ids), "stop", 1)

    def lost(self) -> str:
        return self.dead

    def revive(self) -> bool:
        self.dead, self.revived = "", self.revived + 1
        return True

    def take_stats(self) -> EngineStats:
        return EngineStats(requests=self.requests)


@pytest.fixture(scope="module")
def setup() -> EpisodeSetup:
    words = template_words("compact") | set(registry.get("household").vocabulary())  # type: ignore[attr-defined]
    settings = RolloutSettings(
        max_turn_tokens=8, max_critique_tokens=8, context_tokens=512, templates="compact", max_turns=2, concurrency=2
    )
    return EpisodeSetup(registry.environment, Prompter(build_tokenizer(words), settings), settings)


def play(setup: EpisodeSetup, mortal: Mortal) -> tuple[Played, list[bool]]:
    resent: list[bool] = []
    progress = Progress(console=Console(file=io.StringIO()))
    source = EngineSource(setup, same_speakers(mortal), mortal, resent.append, lambda mine: [mine], progress)  # type: ignore[arg-type]
    return source.play(RolloutRequest(TASKS, EPISODES, Seeds(0, 0), 1)), resent


def source_on(setup: EpisodeSetup, mortal: Mortal) -> EngineSource:
    progress = Progress(console=Console(file=io.StringIO()))
    return EngineSource(setup, same_speakers(mortal), mortal, lambda stale: None, lambda mine: [mine], progress)  # type: ignore[arg-type]


def test_replayed_tokens_are_counted_as_discarded(setup: EpisodeSetup) -> None:
    whole, _ = play(setup, Mortal(setup.prompter))
    assert (whole.used_tokens(), whole.discarded_tokens, whole.kept_tokens) == (whole.generated_tokens(), 0, 0)
    mortal = Mortal(setup.prompter, dies_at=frozenset({5, 8}))
    played, _ = play(setup, mortal)
    reply = len(setup.prompter.encode_reply("look"))
    # Two requests got no answer; the answers to requests in flight at that time were discarded.
    assert played.generated_tokens() == (mortal.requests - 2) * reply
    assert played.used_tokens() == whole.used_tokens()
    assert played.discarded_tokens == played.generated_tokens() - played.used_tokens()


def test_the_turn_limit_of_a_step_ends_attempts(setup: EpisodeSetup) -> None:
    source = source_on(setup, Mortal(setup.prompter))
    for turns, expected in ((None, 2), (1, 1), (2, 2)):
        played = source.play(RolloutRequest(TASKS, EPISODES, Seeds(0, 0), 1, turns=turns))
        attempts = [attempt for episode in played.episodes for attempt in episode.attempts]
        assert len(attempts) == len(TASKS) * EPISODES
        assert {(len(a.turns), a.stop_reason) for a in attempts} == {(expected, "max_turns")}


def test_control_report_resumes_after_its_engine_is_lost(setup: EpisodeSetup) -> None:
    def report(mortal: Mortal) -> tuple[ControlResult, int]:
        source, state, found = source_on(setup, mortal), ControlState(), list[ControlResult]()

        def play_rest() -> int:
            played = control(TASKS, 3, Seeds(0, 0), state, setup, source.speakers_for)
            try:
                found.append(asyncio.run(played))
            except EngineLostError:
                return 1
            return 0

        return (found, source.play_with_recovery(1, play_rest))[0][0], mortal.requests

    undisturbed, requests = report(Mortal(setup.prompter))
    assert undisturbed.failures == 3
    # Once in the first attempts and once in the retries.
    died = Mortal(setup.prompter, dies_at=frozenset({2, 11}))
    again, more = report(died)
    assert died.revived == 2
    assert again == undisturbed
    assert requests < more < 2 * requests, "episodes finished before an engine was lost are not replayed"
    dropped, _ = report(Mortal(setup.prompter, fails_at=frozenset(range(6, 100))))
    assert (dropped.failures, dropped.dropped) == (0, 3)


def places(played: Played) -> list[tuple[str, int]]:
    return [(e.task.task_id, e.index) for e in played.episodes]


def test_only_unfinished_episodes_of_a_lost_engine_are_replayed(setup: EpisodeSetup) -> None:
    whole, _ = play(setup, Mortal(setup.prompter))
    mortal = Mortal(setup.prompter, dies_at=frozenset({5, 8}))
    played, resent = play(setup, mortal)
    assert places(played) == places(whole) == [(t.task_id, i) for t in TASKS for i in range(EPISODES)]
    assert (played.deaths, mortal.revived, resent) == (2, 2, [True, True])
    assert played.dropped == ()
    # Twelve turns plus those of the episodes that were in flight, not all turns again.
    assert 12 < mortal.requests < 12 + 2 * 4


def test_third_lost_engine_in_a_step_ends_the_run(setup: EpisodeSetup) -> None:
    mortal = Mortal(setup.prompter, dies_at=frozenset({1, 3, 5}))
    with pytest.raises(EngineError, match=f"{MAX_DEATHS} engines were lost in one step. died at request 5"):
        play(setup, mortal)


def test_lost_engines_are_counted_per_step(setup: EpisodeSetup) -> None:
    """Each batch has 12 turns: two engines are lost in the first batch, one in its replacement."""
    mortal = Mortal(setup.prompter, dies_at=frozenset({1, 4, 25}))
    source = source_on(setup, mortal)
    assert source.play(RolloutRequest(TASKS, EPISODES, Seeds(0, 3), 1)).deaths == 2
    with pytest.raises(EngineError, match=f"{MAX_DEATHS} engines were lost in one step"):
        source.play(RolloutRequest(TASKS, EPISODES, Seeds(0, 3, "train/1"), 1))
    later = source_on(setup, Mortal(setup.prompter, dies_at=frozenset({1, 4, 25})))
    assert [later.play(RolloutRequest(TASKS, EPISODES, Seeds(0, step), 1)).deaths for step in (3, 4)] == [2, 1]


def test_failed_request_is_retried_once_before_the_episode_is_dropped(setup: EpisodeSetup) -> None:
    once, _ = play(setup, Mortal(setup.prompter, fails_at=frozenset({0})))
    assert (len(once.episodes), len(once.dropped)) == (6, 0)
    always, _ = play(setup, Mortal(setup.prompter, fails_at=frozenset(range(100))))
    assert (len(always.episodes), len(always.dropped)) == (0, 6)
    assert "failed" in always.dropped[0].error


def test_first_rank_of_each_group_leads() -> None:
    assert [lead_rank(rank, 8, 4) for rank in range(8)] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert [lead_rank(rank, 2, 1) for rank in range(2)] == [0, 0]
