"""Teachers' demonstrations are ordinary episodes with the success rates that the task sets intend."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.episode import EpisodeSetup, play
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.rollout.teacher import teacher_speakers
from icrl_megatron.settings.schema import RolloutSettings
from icrl_megatron.tasks import registry
from icrl_megatron.types import Episode
from icrl_megatron.utils.errors import ConfigError

SETTINGS = RolloutSettings(max_turn_tokens=4, context_tokens=200, templates="compact")
SEEDS = Seeds(run=0, step=0)


@pytest.mark.parametrize("name", ["rulebook_hard", "rulebook_easy", "household", "archive", "archive_easy"])
def test_teachers_play_ordinary_episodes(name: str) -> None:
    task_set: Any = registry.get(name)
    tokenizer = build_tokenizer([*task_set.vocabulary(), *template_words("compact")])
    settings = RolloutSettings(rounds=2, templates="compact", context_tokens=512)
    prompter = Prompter(tokenizer, settings)
    setup = EpisodeSetup(registry.environment, prompter, settings)
    tasks = random.Random(0).sample(list(task_set.problems("train")), 40)

    def demonstrate(seed: int) -> list[Episode]:
        speakers_for = teacher_speakers(registry.get, prompter, Seeds(seed, 0, "sft"))
        episodes, dropped = asyncio.run(play(tasks, 1, setup, speakers_for, SEEDS))
        assert not dropped
        return episodes

    episodes = demonstrate(0)
    assert demonstrate(0) == episodes != demonstrate(1)
    revisions = [e.attempts[1] for e in episodes if len(e.attempts) == 2]
    # A correct critique leads to success, and about 40 % of the teacher's critiques are correct.
    assert 0.15 < sum(r.success for r in revisions) / len(revisions) < 0.75
    for episode in episodes:
        ids = [i for a in episode.attempts for i in (*a.prompt_ids, *a.response_ids())]
        assert tokenizer.unk_token_id not in ids
        for attempt in episode.attempts:
            stop = registry.environment(episode.task).dialogue.stop if name.startswith("archive") else ()
            ends = [prompter.ended(t.completion.ids) or t.text.endswith(stop or "never") for t in attempt.turns]
            assert all(ends)
            assert not any(attempt.rollout_logprobs())


@pytest.mark.parametrize("limits", [{"max_turn_tokens": 4}, {"max_turn_tokens": None}])
def test_demonstration_longer_than_the_reply_limit_is_an_error(limits: dict[str, int | None]) -> None:
    task_set = registry.get("rulebook_hard")
    prompter = Prompter(build_tokenizer(["a"]), SETTINGS)
    task = task_set.problems("train")[0]
    room = len(prompter.attempt(asyncio.run(registry.environment(task).reset()))) + 4
    settings = replace(SETTINGS, **limits, context_tokens=200 if limits["max_turn_tokens"] else room)
    setup = EpisodeSetup(registry.environment, prompter, settings)
    speakers_for = teacher_speakers(registry.get, prompter, SEEDS)
    remedy = r"raise rollout\.max_turn_tokens \(unless it is null\) or rollout\.context_tokens"
    with pytest.raises(ConfigError, match=rf"has 5 tokens, and the limit is 4: {remedy}"):
        asyncio.run(play([task], 1, setup, speakers_for, SEEDS))


def test_calls_and_tokens_reduce_the_reward_and_calls_are_limited() -> None:
    task_set: Any = registry.get("archive")
    tokenizer = build_tokenizer([*task_set.vocabulary(), *template_words("compact")])
    prompter = Prompter(tokenizer, RolloutSettings(templates="compact", context_tokens=512))
    tasks = list(task_set.problems("train")[:40])

    def played(**changes: Any) -> list[Episode]:
        settings = RolloutSettings(rounds=1, templates="compact", context_tokens=512, **changes)
        setup = EpisodeSetup(registry.environment, prompter, settings)
        speakers_for = teacher_speakers(registry.get, prompter, Seeds(0, 0, "sft"))
        return asyncio.run(play(tasks, 1, setup, speakers_for, SEEDS))[0]

    free, charged = played(), played(call_cost=0.03, token_cost=0.002)
    assert {a.outcome for e in free for a in e.attempts} == {0.0, 1.0}
    for before, after in zip(free, charged, strict=True):
        (plain,), (paid,) = before.attempts, after.attempts
        cost = 0.03 * dict(paid.measures)["calls"] + 0.002 * sum(len(t.completion.ids) for t in paid.turns)
        assert paid.outcome == pytest.approx(max(0.0, plain.outcome - cost)) and paid.success == plain.success
    limited = played(max_calls=2)
    assert all("No calls are left" in e.attempts[0].turns[2].observation for e in limited)
    assert all(dict(e.attempts[0].measures)["calls_refused"] >= 1 for e in limited)
