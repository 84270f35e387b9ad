"""Episodes that are interrupted and resumed later, with a scripted speaker and the real Household."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.engines.protocol import EngineStats
from icrl_megatron.engines.rank import Share
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.episode import EpisodeSetup, play_all
from icrl_megatron.rollout.groups import Groups, split_tasks
from icrl_megatron.rollout.journal import Journal
from icrl_megatron.rollout.played import RolloutRequest
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.replay import (
    InterruptedEpisodeError,
    Logged,
    ReplayLog,
    Stop,
    from_lines,
    recorded,
    to_lines,
    tokens,
)
from icrl_megatron.rollout.source import EngineSource
from icrl_megatron.rollout.speakers import Ask, Seeds, Speakers, SpeakersFor
from icrl_megatron.run.checks import validate
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.tasks import registry
from icrl_megatron.types import Completion, Episode, Task, UnplayedEpisode
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.progress import Progress

SEEDS = Seeds(0, 0)


def ask(prompt: Sequence[int], room: int = 10) -> Ask:
    return Ask("attempt", tuple(prompt), room, 0, "", None)


@dataclass
class Scripted:
    """Gives the replies in order and records the requests."""

    replies: list[Completion]
    asked: list[Ask] = field(default_factory=list)

    async def reply(self, ask: Ask) -> Completion:
        self.asked.append(ask)
        return self.replies[len(self.asked) - 1]


def said(*ids: int, reason: str = "stop", version: int = 1) -> Completion:
    return Completion(ids, tuple(-float(i) for i in ids), reason, version)  # type: ignore[arg-type]


def record(replay_log: ReplayLog, stop: Stop, *replies: Completion) -> tuple[Scripted, Speakers]:
    speaker = Scripted(list(replies))
    return speaker, recorded(Speakers(speaker, speaker), replay_log, stop, lambda ids, stop: ids)


async def test_interrupted_reply_resumes_and_keeps_its_logprobs() -> None:
    replay_log, stop = ReplayLog(), Stop()
    _, speakers = record(replay_log, stop, said(1, 2), said(3, reason="abort"))
    await speakers.solver.reply(ask([9]))
    stop.asked = True  # as if this happened while the next reply is generated
    replay_log.replies.append(Logged.of((9, 1, 2, 8), said(3, reason="abort")))
    speaker, again = record(replay_log, Stop(), said(4, 5, version=2))
    assert (await again.solver.reply(ask([9]))).ids.tolist() == [1, 2]
    joined = await again.critic.reply(ask([9, 1, 2, 8]))
    assert joined == Completion((3, 4, 5), (-3.0, -4.0, -5.0), "stop", 2, ((1, 1),))
    assert [(a.prompt_ids, a.max_new_tokens) for a in speaker.asked] == [((9, 1, 2, 8, 3), 9)]


async def test_after_a_stop_no_request_is_sent_and_replies_are_kept() -> None:
    replay_log = ReplayLog([Logged.of((9,), said(1)), Logged.of((9, 1), said(2, reason="abort"))])
    speaker, speakers = record(replay_log, Stop(asked=True))
    with pytest.raises(InterruptedEpisodeError):
        await speakers.solver.reply(ask([9]))
        await speakers.solver.reply(ask([9, 1]))
    assert speaker.asked == []
    assert [r.completion.ids.tolist() for r in replay_log.replies] == [[1], [2]]


async def test_different_observation_discards_the_rest_of_a_replay_log() -> None:
    replay_log = ReplayLog([Logged.of((9,), said(1)), Logged.of((9, 1, 7), said(2))])
    _, speakers = record(replay_log, Stop(), said(5))
    assert [(await speakers.solver.reply(ask(p))).ids.tolist() for p in ([9], [9, 1, 6])] == [[1], [5]]
    assert replay_log.replies == [Logged.of((9,), said(1)), Logged.of((9, 1, 6), said(5))]


@pytest.fixture(scope="module")
def setup() -> EpisodeSetup:
    words = template_words("compact") | set(registry.get("household").vocabulary())  # type: ignore[attr-defined]
    tokenizer: PreTrainedTokenizerFast = build_tokenizer(words)
    settings = RolloutSettings(
        max_turn_tokens=8, max_critique_tokens=8, context_tokens=512, templates="compact", rounds=1, max_turns=3
    )
    return EpisodeSetup(registry.environment, Prompter(tokenizer, settings), settings)


@dataclass
class Slow:
    """Answers at once; if `slow`, the second reply waits until it is interrupted."""

    prompter: Prompter
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    slow: bool = False
    turns: int = 0

    async def interrupt(self) -> None:
        self.stop.set()

    async def reply(self, ask: Ask) -> Completion:
        self.turns += 1
        ids = self.prompter.encode_reply("look")
        if self.slow and self.turns == 2:
            await self.stop.wait()
            return Completion(ids[:1], (-1.0,), "abort", 1)
        return Completion(ids, (-1.0,) * len(ids), "stop", 1)


async def test_step_with_enough_groups_keeps_slow_episodes_for_the_next(setup: EpisodeSetup) -> None:
    tasks = list(registry.get("household").problems("train"))[:3]
    groups = Groups(tasks, 2, needed=2)

    def speakers_of(task: object, index: int) -> Speakers:
        speaker = Slow(setup.prompter, slow=task == tasks[0])
        return Speakers(speaker, speaker)

    groups.begin(lambda: None)
    speakers = groups.recorded(speakers_of, setup.prompter.before_stop)
    results = await play_all(groups.pairs(), setup, speakers, SEEDS, groups.ended)
    await groups.wait_for_interruption()
    assert [isinstance(r, UnplayedEpisode) for r in results] == [True, True, False, False, False, False]
    assert {e.task for e in groups.complete()} == set(tasks[1:])
    assert groups.discarded() == 2
    kept = groups.cut_off()
    assert list(kept) == [tasks[0]]
    assert [len(t.replies) for t in kept[tasks[0]].values()] == [2, 2]

    (mine,) = split_tasks(tasks[1:], [list(kept)])
    assert mine == [tasks[0], tasks[1]]
    after = Groups(mine, 2, 2, kept)
    speaker = Slow(setup.prompter)
    after.begin(lambda: None)
    speakers = after.recorded(lambda t, i: Speakers(speaker, speaker), setup.prompter.before_stop)
    results = await play_all(after.pairs(), setup, speakers, SEEDS, after.ended)
    resumed = [r for r in results if isinstance(r, Episode) and r.task == tasks[0]]
    assert [r.attempts[0].turns[1].completion.older for r in resumed] == [((1, 1),), ((1, 1),)]


def test_separate_critic_is_interrupted_too(setup: EpisodeSetup) -> None:
    """A frozen or an external critic is not the trained engine."""
    tasks, waited = list(registry.get("household").problems("train"))[:3], list[float]()

    @dataclass
    class Critic:
        stop: asyncio.Event = field(default_factory=asyncio.Event)
        waits: bool = False

        async def interrupt(self) -> None:
            self.stop.set()

        async def reply(self, ask: Ask) -> Completion:
            begun = time.monotonic()
            while self.waits and not self.stop.is_set() and time.monotonic() < begun + 20:
                await asyncio.sleep(0.01)
            waited.append(time.monotonic() - begun)
            return said(5, reason="abort" if self.waits else "stop")

    def speakers_of(task: Task, index: int) -> Speakers:
        return Speakers(Slow(setup.prompter), Critic(waits=task == tasks[0]))

    quiet = Progress(console=Console(file=io.StringIO()))
    source = EngineSource(setup, speakers_of, Engine(), lambda stale: None, lambda mine: [mine], quiet)  # type: ignore[arg-type]
    played = source.play(RolloutRequest(tasks, 2, SEEDS, 2, 2))
    assert {e.task for e in played.episodes} == set(tasks[1:])
    assert len(waited) == 6 and max(waited) < 10


def test_replay_logs_round_trip_as_text() -> None:
    task = Task("household/train/1", "household", "train", '{"goal": "ü"}')
    joined = Completion((3, 4), (-0.1, -2.5), "abort", 2, ((1, 1),))
    first = ReplayLog([Logged.of((9, 8), said(1, 2)), Logged.of((9, 8, 1, 2), joined)])
    replay_logs = {task: {0: first, 3: ReplayLog()}}
    assert from_lines(to_lines(replay_logs)) == replay_logs
    assert tokens(replay_logs) == 4


@dataclass
class Engine:
    """One rank's engine behind `Slow` speakers."""

    share: Share = field(default_factory=lambda: Share(0, 1))

    def lost(self) -> str:
        return ""

    def take_stats(self) -> EngineStats:
        return EngineStats()


@pytest.mark.parametrize("partial", [True, False])
def test_every_token_is_used_kept_or_discarded(setup: EpisodeSetup, partial: bool, tmp_path: Path) -> None:
    tasks = list(registry.get("household").problems("train"))[:3]
    engine, slow = Engine(), [tasks[0]]

    def speakers_of(task: Task, index: int) -> Speakers:
        speaker = Slow(setup.prompter, slow=task in slow)
        return Speakers(speaker, speaker)

    settings = replace(setup.settings, partial=partial, oversample=1.5)
    changed, quiet = replace(setup, settings=settings), Progress(console=Console(file=io.StringIO()))

    def source() -> EngineSource:
        return EngineSource(changed, speakers_of, engine, lambda stale: None, lambda mine: [mine], quiet)  # type: ignore[arg-type]

    reply = len(setup.prompter.encode_reply("look"))
    first = source()
    played = first.play(RolloutRequest(tasks, 2, SEEDS, 1, 2))
    assert played.used_tokens() == 2 * 2 * 3 * reply
    assert played.generated_tokens() == played.used_tokens() + 2 * (reply + 1)
    assert (played.kept_tokens, played.discarded_tokens) == ((2 * (reply + 1), 0) if partial else (0, 2 * (reply + 1)))

    # Another process resumes from a checkpoint.
    second = source()
    (tmp_path / "replay.jsonl").write_text("".join(f"{line}\n" for line in first.unfinished()()))
    assert second.restore(tmp_path / "replay.jsonl", tasks) == 0
    slow.clear()
    later = second.play(RolloutRequest(tasks[1:], 2, SEEDS, 1, 2))
    assert (later.kept_tokens, later.discarded_tokens) == (0, 0)
    assert later.generated_tokens() == later.used_tokens() - played.kept_tokens
    resumed = [t.completion for e in later.episodes for a in e.attempts for t in a.turns if t.completion.older]
    assert len(resumed) == (2 if partial else 0)


@settings(max_examples=200)
@given(st.data())
def test_each_rank_gets_its_share_of_distinct_tasks(data: st.DataObject) -> None:
    tasks = [Task(f"t/train/{i}", "t", "train", "") for i in range(12)]
    shares = data.draw(st.integers(1, 4))
    drawn = data.draw(st.permutations(tasks))[: data.draw(st.integers(1, 8))]
    kept: list[list[Task]] = [[] for _ in range(shares)]
    for task in data.draw(st.permutations(tasks))[: data.draw(st.integers(0, 6))]:
        kept[data.draw(st.integers(0, shares - 1))].append(task)
    split = split_tasks(drawn, kept)
    assert [len(share) for share in split] == [len(drawn[index::shares]) for index in range(shares)]
    given = [task for share in split for task in share]
    assert len(set(given)) == len(given)
    for share, mine in zip(split, kept, strict=True):
        assert share[: len(mine)] == mine[: len(share)], "kept tasks resume on the rank that kept them"
    if not any(kept):
        assert split == [drawn[index::shares] for index in range(shares)]


def test_task_kept_by_one_rank_is_not_played_by_another(setup: EpisodeSetup) -> None:
    """Two ranks with one engine each draw from only seven tasks, so kept tasks are soon drawn again."""
    problems = list(registry.get("household").problems("train"))[:7]
    sampler = TaskSampler([TaskSource("household")], {"household": problems}, 0)
    changed = replace(setup, settings=replace(setup.settings, partial=True, oversample=1.5))
    meeting, said = threading.Barrier(2, timeout=60), [object(), object()]
    played: list[list[tuple[str, int]]] = []

    def rank(index: int) -> None:
        engine, slow = Engine(share=Share(index, 2)), set[Task]()

        def gather(mine: object) -> list[object]:
            said[index] = mine
            meeting.wait()
            everyone = list(said)
            meeting.wait()
            return everyone

        def speakers_of(task: Task, number: int) -> Speakers:
            speaker = Slow(setup.prompter, slow=task in slow)
            return Speakers(speaker, speaker)

        quiet = Progress(console=Console(file=io.StringIO()))
        source = EngineSource(changed, speakers_of, engine, lambda stale: None, gather, quiet)  # type: ignore[arg-type]
        for step in range(8):
            tasks = sampler.draw(step, 0, 6)
            slow.clear()
            slow.update(task for task in tasks[(step + index) % 2 :: 2][:1] if task not in source.kept)
            found = source.play(RolloutRequest(tasks, 2, Seeds(0, step), 1, 4))
            if index == 0:
                played.append([(e.task.task_id, e.index) for e in found.headers])

    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(rank, range(2)))
    assert len(played) == 8
    assert all(len(set(places)) == len(places) >= 8 for places in played), played


def test_partial_rollouts_require_oversampling_and_correction() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.oversample above 1"):
        validate(load("rulebook_easy", ["rollout.partial=true"]))
    with pytest.raises(ConfigError, match=r"algo\.mismatch_correction\.enabled=true"):
        validate(load("rulebook_easy", ["rollout.partial=true", "rollout.oversample=1.5"]))


@pytest.mark.parametrize("cut", [0, 7, 40])
def test_a_step_that_was_killed_goes_on_from_its_ended_episodes(setup: EpisodeSetup, tmp_path: Path, cut: int) -> None:
    """`cut` bytes of the last line were not written."""
    tasks, asked = list(registry.get("household").problems("train"))[:4], list[tuple[str, int]]()
    quiet = Progress(console=Console(file=io.StringIO()))

    class Killed(Exception):
        """As if the process ended here."""

    def speakers_for(dies_at: int) -> SpeakersFor:
        def speakers_of(task: Task, index: int) -> Speakers:
            asked.append((task.task_id, index))
            if len(asked) > dies_at:
                raise Killed
            speaker = Slow(setup.prompter)
            return Speakers(speaker, speaker)

        return speakers_of

    def source(dies_at: int = 100) -> EngineSource:
        one = replace(setup, settings=replace(setup.settings, concurrency=1))
        made = EngineSource(one, speakers_for(dies_at), Engine(), lambda stale: None, lambda mine: [mine], quiet)  # type: ignore[arg-type]
        made.journal = Journal(tmp_path, 0, 1)
        return made

    request = RolloutRequest(tasks, 2, SEEDS, 1, 4)
    with contextlib.suppress(Exception):
        source(dies_at=5).play(request)
    (path,) = (tmp_path / "unfinished_steps").iterdir()
    text = path.read_text()
    ended = text.count('"purpose"')
    assert 1 <= ended <= 5
    path.write_text(text[: len(text) - cut])
    asked.clear()
    again = source()
    played = again.play(request)
    replayed = ended - (cut > 0)
    reply = len(setup.prompter.encode_reply("look"))
    assert len(played.episodes) == 8 and played.generated_tokens() == played.used_tokens() == 8 * 3 * reply
    assert again.journal is not None
    assert path.read_text().count('"purpose"') >= 8, "each episode is there, and replayed ones are not written again"
    assert len(path.read_text().splitlines()) <= ended + 8 - replayed + 3
    assert played.episodes == source().play(request).episodes, "all are replayed"
    again.saved(SEEDS.step)  # a checkpoint of the steps before
    assert path.exists()
    again.saved(SEEDS.step + 1)
    assert not path.exists()
    again.play(replace(request, seeds=replace(SEEDS, step=SEEDS.step + 1)))
    assert len(list((tmp_path / "unfinished_steps").iterdir())) == 1
