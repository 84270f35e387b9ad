"""Episodes: recorded ids are those that the engine saw; every stop reason; what each prompt contains."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ladder import SEEDS, SETTINGS, VOCABULARY, Ladder, Recorder, Script, ladder, ladder_prompter, scripted, solving
from transformers import AutoModelForCausalLM

from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.algo.headers import headers_of
from icrl_megatron.engines.local import LocalEngine
from icrl_megatron.engines.protocol import EngineError
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.rollout.episode import EpisodeSetup, play, play_episode
from icrl_megatron.rollout.prompts import Prompter
from icrl_megatron.rollout.speakers import Ask, EmptyCritic, EngineSpeaker, Seeds, Speakers, same_speakers
from icrl_megatron.settings.schema import EngineSettings, TinyModel
from icrl_megatron.telemetry.metrics import rollout_metrics
from icrl_megatron.types import Attempt, Completion, Episode, Task
from icrl_megatron.utils.errors import ConfigError

PARSED, SKIPPED = {"parse_truncated": True}, {"repeats_over_invalid": True}
WAITS = ["wait", "wait", "up"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_tiny(path, TinyModel(hidden=32, ffn=64, head_dim=8), VOCABULARY, 0)
    return path


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return ladder_prompter()


@pytest.fixture
def engine(folder: Path) -> LocalEngine:
    return LocalEngine(folder, EngineSettings(), torch.float32, "cpu")


@pytest.mark.parametrize("max_turn_tokens", [60, None])
def test_recorded_ids_are_those_that_the_engine_saw(
    folder: Path, engine: LocalEngine, prompter: Prompter, max_turn_tokens: int | None
) -> None:
    solver = Recorder(EngineSpeaker(engine, 1.0, prompter.stop_ids))
    critic = Recorder(EngineSpeaker(engine, 0.7, prompter.stop_ids))
    speakers_for = same_speakers(solver, critic)
    setup = EpisodeSetup(Ladder, prompter, replace(SETTINGS, max_turn_tokens=max_turn_tokens))
    tasks = [ladder(str(i), 5) for i in range(6)]
    episodes, dropped = asyncio.run(play(tasks, 2, setup, speakers_for, SEEDS))
    assert len(episodes) == 12 and not dropped
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = {(ask.prompt_ids, completion) for ask, completion in solver.seen}
    turns = 0
    for episode in episodes:
        assert len(episode.critiques) == len(episode.attempts) - 1
        for attempt in episode.attempts:
            context = tuple(attempt.prompt_ids.tolist())
            for turn in attempt.turns:
                assert (context, turn.completion) in seen
                context += (*turn.completion.ids.tolist(), *turn.observation_ids.tolist())
                turns += 1
            assert context == (*attempt.prompt_ids, *attempt.response_ids())
            assert len(attempt.response_ids()) == len(attempt.loss_mask()) == len(attempt.rollout_logprobs())
            check_logprobs(model, attempt)
    assert turns == len(solver.seen) > 24
    written = [c.completion for e in episodes for c in e.critiques]
    assert sorted(c.ids.tolist() for c in written) == sorted(completion.ids.tolist() for _, completion in critic.seen)


def check_logprobs(model: torch.nn.Module, attempt: Attempt) -> None:
    """The recorded log-probs are those of one forward pass over the attempt, and 0 outside of the mask."""
    ids = torch.tensor([[*attempt.prompt_ids, *attempt.response_ids()]])
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    expected = logprobs[len(attempt.prompt_ids) - 1 :] * torch.tensor(attempt.loss_mask())
    torch.testing.assert_close(torch.tensor(attempt.rollout_logprobs()), expected, atol=1e-5, rtol=0)


def test_episodes_are_repeatable_and_in_the_order_of_the_tasks(engine: LocalEngine, prompter: Prompter) -> None:
    speakers_for = same_speakers(EngineSpeaker(engine, 1.0, prompter.stop_ids))
    tasks = [ladder(name, 2) for name in ("b", "a", "c")]

    def once(concurrency: int, seeds: Seeds = SEEDS) -> list[Episode]:
        setup = EpisodeSetup(Ladder, prompter, replace(SETTINGS, concurrency=concurrency))
        return asyncio.run(play(tasks, 3, setup, speakers_for, seeds))[0]

    first = once(512)
    assert [(e.task.task_id, e.index) for e in first] == [(t.task_id, i) for t in tasks for i in range(3)]
    assert once(512) == first
    ids = [a.response_ids().tolist() for e in first for a in e.attempts]
    assert [a.response_ids().tolist() for e in once(2) for a in e.attempts] == ids
    assert [a.response_ids().tolist() for e in once(512, replace(SEEDS, step=1)) for a in e.attempts] != ids


def test_rounds_continue_until_success_and_see_only_the_latest_critique(prompter: Prompter) -> None:
    failure, success = ["down", "down", "down"], ["up", "up", "up"]
    critiques = ["<critic> advice1 </critic>", "advice2"]
    episode, solver, critic = scripted(prompter, [*failure, *failure, *success], critiques)
    assert [a.success for a in episode.attempts] == [False, False, True]
    assert [c.text for c in episode.critiques] == ["advice1", "advice2"]
    assert [a.round for a in episode.attempts] == [0, 1, 2] and [c.round for c in episode.critiques] == [0, 1]
    plain = prompter.attempt("start at bottom")
    revisions = [prompter.revision("start at bottom", advice) for advice in ("advice1", "advice2")]
    assert [tuple(a.prompt_ids) for a in episode.attempts] == [plain, *revisions]
    assert {tuple(a.plain_prompt_ids) for a in episode.attempts} == {plain}
    assert [a.role for a in critic.asked] == ["critique", "critique"]
    assert [a.critique for a in solver.asked] == [None] * 3 + ["advice1"] * 3 + ["advice2"] * 3
    assert len({a.seed for a in (*solver.asked, *critic.asked)}) == 11


@pytest.mark.parametrize(("rounds", "attempts"), [(1, 1), (2, 2), (3, 2)])
def test_an_episode_stops_at_success_or_after_its_last_round(prompter: Prompter, rounds: int, attempts: int) -> None:
    replies = ["down", "down", "down", "up", "up", "up"]
    episode, *_ = scripted(prompter, replies, ["advice1"], rounds=rounds)
    assert len(episode.attempts) == attempts and len(episode.critiques) == attempts - 1
    assert episode.attempts[-1].success == (rounds > 1)


def priced_ladder(task: Task) -> Ladder:
    made = Ladder(task)
    made.measures = lambda: {"calls": 3.0}  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("costs", "outcomes"),
    [
        ({}, [0.1, 1.0]),
        ({"call_cost": 0.1}, [0.0, 0.7]),
        ({"token_cost": 0.01}, [0.1 - 0.04, 1.0 - 0.04]),
        ({"call_cost": 0.02, "token_cost": 0.001}, [0.1 - 0.064, 1.0 - 0.064]),
    ],
)
def test_costs_reduce_the_reward_but_not_success(
    prompter: Prompter, costs: dict[str, float], outcomes: list[float]
) -> None:
    game = {"goal": 2, "environment": priced_ladder, "rounds": 2, "max_turns": 2}
    episode, *_ = scripted(prompter, ["up", "wait", "up", "up"], ["advice1"], **game, **costs)
    tokens = [sum(len(turn.completion.ids) for turn in attempt.turns) for attempt in episode.attempts]
    assert tokens == [4, 4]
    assert [attempt.outcome for attempt in episode.attempts] == pytest.approx(outcomes)
    assert [attempt.success for attempt in episode.attempts] == [False, True]
    if not costs:
        answered = replace(episode.attempts[1], measures=(("answered", 1.0),))
        counted = replace(episode, attempts=(episode.attempts[0], answered))
        found = rollout_metrics(headers_of([counted]), [], CreditReport((), 0, 0, 0, 0))
        assert found["attempt/tokens_to_answer"] == 4.0 and found["attempt/observation_tokens"] > 0


def test_the_critic_reads_the_trajectory_and_its_outcome(prompter: Prompter) -> None:
    replies = ["up", "nonsense", "wait", "wait", "wait", "up", "up", "up"]
    _, _, critic = scripted(prompter, replies, ["advice1"], rounds=2, goal=3)
    seen = [("up", "at high"), ("nonsense", "hint"), ("wait", "at high"), ("wait", "at high"), ("wait", "at high")]
    turns = [prompter.turn_text(i + 1, text, observation) for i, (text, observation) in enumerate(seen)]
    assert critic.asked[0].prompt_ids == prompter.critique("start at bottom", turns, "lost")
    assert critic.asked[0].max_new_tokens == SETTINGS.max_critique_tokens


@pytest.mark.parametrize(
    ("replies", "reason", "actions", "changes"),
    [
        (["up", "up"], "done", ["up", "up"], {}),
        (["up", "wait", "up"], "done", ["up", "wait", "up"], {"repeat_limit": 2}),
        (["wait", "wait", "wait"], "repeated", ["wait"] * 3, {}),
        (["wait", "nonsense"] * 2, "max_turns", ["wait", None] * 2, {"max_turns": 4, "repeat_limit": 2}),
        (["nonsense"] * 8, "max_turns", [None] * 8, {}),
        (["wait", "nonsense"] * 2 + ["wait"], "repeated", ["wait", None] * 2 + ["wait"], SKIPPED),
        (["nonsense"] * 8, "max_turns", [None] * 8, SKIPPED),
        ([*WAITS, "nonsense", "wait", "up", "up"], "done", [*WAITS, None, "wait", "up"], SKIPPED),
        (["up", "down go..."], "length", ["up", None], {}),
        (["up", "down", "wait"], "context", ["up", "down", "wait"], {"context_tokens": 27}),
        (["up", "up go go go..."], "context", ["up", None], {"context_tokens": 16}),
        (["up", "up go go go..."], "context", ["up", None], {"context_tokens": 16, "max_turn_tokens": None}),
        (["up", "up go go go..."], "done", ["up", "up"], {"context_tokens": 16, **PARSED}),
        (["up", "go go go up..."], "context", ["up", None], {"context_tokens": 15, "max_turn_tokens": None, **PARSED}),
        (["go go go...", "up", "up go..."], "done", [None, "up", "up"], PARSED),
        (["wait...", "wait go go...", "wait..."], "repeated", ["wait"] * 3, PARSED),
        (["go..."] * 8, "max_turns", [None] * 8, PARSED),
    ],
)
def test_every_stop_reason_of_an_attempt(
    prompter: Prompter, replies: list[str], reason: str, actions: list[str | None], changes: dict[str, Any]
) -> None:
    episode, solver, _ = scripted(prompter, replies, [], goal=2, rounds=1, **changes)
    (attempt,) = episode.attempts
    assert attempt.stop_reason == reason
    assert [turn.action for turn in attempt.turns] == actions
    assert [bool(len(turn.observation_ids)) for turn in attempt.turns] == [True] * (len(actions) - 1) + [False]
    budget = {**SETTINGS.__dict__, **changes}["context_tokens"]
    assert len(attempt.prompt_ids) + len(attempt.response_ids()) <= budget
    assert all(len(ask.prompt_ids) + ask.max_new_tokens <= budget for ask in solver.asked)


def test_a_reply_that_was_cut_is_not_an_action(prompter: Prompter) -> None:
    episode, *_ = scripted(prompter, ["up", "up..."], [], goal=2, rounds=1)
    assert not episode.attempts[0].success and episode.attempts[0].outcome == 0.1


def test_a_turn_without_a_limit_may_use_the_rest_of_the_context(prompter: Prompter) -> None:
    _, solver, _ = scripted(prompter, ["wait", "up", "up"], [], goal=2, rounds=1, max_turn_tokens=None)
    assert [len(ask.prompt_ids) + ask.max_new_tokens for ask in solver.asked] == [SETTINGS.context_tokens] * 3


def test_the_turn_after_a_reply_that_was_cut_is_a_new_message(prompter: Prompter) -> None:
    episode, *_ = scripted(prompter, ["up go...", "up go", "up"], [], goal=3, rounds=1, **PARSED)
    cut, whole, _ = episode.attempts[0].turns
    assert cut.completion.finish_reason == "length" and cut.action == whole.action == "up"
    end = whole.completion.ids[-1:]
    assert (*cut.completion.ids, *end) == tuple(whole.completion.ids)
    assert tuple(cut.observation_ids) == (*end, *whole.observation_ids)


@pytest.mark.parametrize("parsed", [True, False])
def test_a_reply_that_ran_out_of_time_is_never_an_action(prompter: Prompter, parsed: bool) -> None:
    class Late(Script):
        async def reply(self, ask: Ask) -> Completion:
            return replace(await super().reply(ask), finish_reason="abort")

    setup = EpisodeSetup(Ladder, prompter, replace(SETTINGS, rounds=1, parse_truncated=parsed))
    speakers_for = lambda task, index: Speakers(Late(prompter, ["up"]), EmptyCritic())  # noqa: E731
    episode = asyncio.run(play_episode(ladder("late", 1), 0, setup, speakers_for, SEEDS))
    assert isinstance(episode, Episode)
    (attempt,) = episode.attempts
    assert (attempt.stop_reason, attempt.success, attempt.turns[0].action) == ("deadline", False, None)


def test_the_first_turns_of_a_long_trajectory_are_left_out_of_the_critics_prompt(prompter: Prompter) -> None:
    replies, limits = [*["up", "down"] * 4, *["down"] * 3], {"context_tokens": 90, "max_critique_tokens": 60}
    episode, _, critic = scripted(prompter, replies, ["advice1"], rounds=2, goal=8, **limits)
    (ask,) = critic.asked
    assert len(ask.prompt_ids) + ask.max_new_tokens <= 90
    turns = [prompter.turn_text(i + 1, t.text, t.observation) for i, t in enumerate(episode.attempts[0].turns)]
    left = [n for n in range(9) if ask.prompt_ids == prompter.critique("start at bottom", turns[n:], "lost", n)]
    assert left and left[0] > 0


def test_a_prompt_over_the_context_budget_is_an_error(prompter: Prompter) -> None:
    with pytest.raises(ConfigError, match=r"attempt prompt of task 'ladder/one' has \d+ tokens.*context_tokens is 4"):
        scripted(prompter, [], [], context_tokens=4)
    with pytest.raises(ConfigError, match="revision prompt of task"):
        scripted(prompter, ["down", "down", "down"], ["advice1 " * 70], max_critique_tokens=100, context_tokens=50)


def test_an_engine_failure_ends_the_run_and_cancels_the_rest(engine: LocalEngine, prompter: Prompter) -> None:
    setup = EpisodeSetup(Ladder, prompter, SETTINGS)
    engine.sleep()
    speakers_for = same_speakers(EngineSpeaker(engine, 1.0, prompter.stop_ids))
    with pytest.raises(EngineError, match="sleeps"):
        asyncio.run(play([ladder("a", 3), ladder("b", 3)], 4, setup, speakers_for, SEEDS))


def test_an_empty_critic_writes_empty_critiques(prompter: Prompter) -> None:
    setup = EpisodeSetup(Ladder, prompter, replace(SETTINGS, rounds=2))
    episode = asyncio.run(play_episode(ladder("a", 3), 0, setup, solving(prompter, *["wait"] * 6), SEEDS))
    assert isinstance(episode, Episode)
    assert episode.critiques[0].text == "" and len(episode.critiques[0].completion.ids) == 0
    assert tuple(episode.attempts[1].prompt_ids) == prompter.revision("start at bottom", "")


def test_seeds_are_stable_and_all_different() -> None:
    assert SEEDS.of("a", 0, 0, "attempt", 0) == Seeds(0, 0).of("a", 0, 0, "attempt", 0)
    seeds = {
        Seeds(run, step, purpose).of(task, index, round, role, turn)
        for run in (0, 1) for step in (0, 1) for purpose in ("train", "eval") for task in ("a", "a/0")
        for index in (0, 1) for round in (0, 1) for role in ("attempt", "critique") for turn in (0, 1)
    }  # fmt: skip
    assert len(seeds) == 256 and all(0 <= seed < 2**63 for seed in seeds)
