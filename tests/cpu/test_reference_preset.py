"""The two presets against a re-implementation in float64: gradients of a step, and when repeats end an attempt.

It works on rewards and log-probs alone, one token at a time, and shares no code with credit, packing or the loss. Each
setting in which the presets differ is also changed on its own, in both directions.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from icrl_kernels import Chunking, VocabShard, token_objective
from icrl_megatron.actor.actor import _terms
from icrl_megatron.actor.passes import Frozen, HeadPlan, _streams
from icrl_megatron.algo.credit import credit
from icrl_megatron.algo.headers import headers_of
from icrl_megatron.algo.samples import tokens_of
from icrl_megatron.data.packing import lay_out, pack
from icrl_megatron.model.tiny import build_tokenizer
from icrl_megatron.rollout.episode import EpisodeSetup, play_episode
from icrl_megatron.rollout.prompts import Prompter, template_words
from icrl_megatron.rollout.speakers import Ask, EmptyCritic, Seeds, Speakers
from icrl_megatron.settings.loading import apply_overrides, changed
from icrl_megatron.settings.schema import RolloutSettings, Settings
from icrl_megatron.tasks.base import StepResult
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Task, Turn

DIFFERENCES: dict[str, tuple[Any, Any]] = {
    "algo.group_by": ("task_role", "task_round_role"),
    "algo.pseudo_positive": (False, True),
    "algo.pseudo_positive_alone": (False, True),
    "algo.group_filter.enabled": (False, True),
    "algo.group_filter.counted": (False, True),
    "algo.mismatch_correction.enabled": (False, True),
    "rollout.repeats_over_invalid": (False, True),
}
"""Setting -> its value in `paper` and in `reference`."""
OUTCOMES = (0.0, 0.0, 0.25, 0.5, 1.0)
TASKS, EPISODES, ROUNDS = 6, 5, 3
CAP = 2.0


def preset(name: str, *overrides: str) -> Settings:
    return apply_overrides(Settings(), [f"algo.preset={name}", *overrides])


def variants() -> Iterator[tuple[str, str]]:
    """(preset, override): each preset, and each with one setting of the other."""
    for side, name in enumerate(("paper", "reference")):
        yield name, ""
        for setting, values in DIFFERENCES.items():
            yield name, f"{setting}={str(values[1 - side]).lower()}"


def test_every_difference_of_the_presets_is_one_named_setting() -> None:
    found = changed(preset("paper"), preset("reference"))
    assert found.pop("algo.preset") == ("paper", "reference")
    assert found == DIFFERENCES
    for name, override in variants():
        if override:
            setting = override.partition("=")[0]
            assert changed(preset(name), preset(name, override)).keys() == {setting}


# The re-implementation


@dataclass(frozen=True)
class Reply:
    """What one sequence is to the re-implementation: who wrote it when, its reward, and its log-probs by token."""

    task: str
    round: int
    critic: bool
    reward: float
    new: list[float]
    old: list[float]
    engine: list[float]

    @property
    def revision(self) -> bool:
        return self.round > 0 and not self.critic


def published_gradients(replies: dict[str, Reply], options: dict[str, Any]) -> dict[str, list[float]]:
    """Reply -> d loss / d log-prob of each of its tokens. Replies whose group is filtered out have zeros."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, reply in sorted(replies.items()):
        key = (reply.task, reply.critic, reply.round) if options["by_round"] else (reply.task, reply.critic)
        groups.setdefault(key, []).append(name)
    advantage, masked = dict.fromkeys(replies, 0.0), set[str]()
    for names in groups.values():
        rewards = [replies[name].reward for name in names]
        firsts = any(replies[name].round == 0 and not replies[name].critic for name in names)
        hopeless = not any(reward == 1.0 for reward in rewards) or sum(rewards) / len(rewards) < 0.3
        if options["filter"] and not firsts and hopeless:
            masked.update(names)
        pseudo = options["pseudo"] and (len(names) > 1 or options["pseudo_alone"])
        values = [*rewards, 1.0] if pseudo else rewards
        if len(values) < 2 or max(values) - min(values) < 1e-8:
            continue
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        for name in names:
            advantage[name] = (replies[name].reward - mean) / (deviation + 1e-6)
    samples = len(replies) if options["count_masked"] else len(replies) - len(masked)
    return {
        name: [
            0.0 if name in masked else token_gradient(reply, t, advantage[name], options) / (samples * len(reply.new))
            for t in range(len(reply.new))
        ]
        for name, reply in replies.items()
    }


def token_gradient(reply: Reply, t: int, advantage: float, options: dict[str, Any]) -> float:
    """d/dx of -w min(rho A, clip(rho) A), where x is the log-prob and rho = exp(x - old)."""
    ratio = math.exp(reply.new[t] - reply.old[t])
    weight = 1.0
    if reply.revision or options["weigh_all"]:
        weight = min(math.exp(reply.old[t] - reply.engine[t]), CAP)
    clipped = min(max(ratio, 0.8), 1.28)
    if clipped * advantage < ratio * advantage:
        return 0.0
    return -weight * ratio * advantage


def published_length(actions: list[str | None], limit: int, skip_invalid: bool) -> tuple[int, bool]:
    """(turns played, whether repeats ended the attempt)."""
    series: list[str] = []
    for number, action in enumerate(actions, start=1):
        if action is None:
            series = series if skip_invalid else []
            continue
        series = [*series, action] if series and series[0] == action else [action]
        if len(series) == limit:
            return number, True
    return len(actions), False


# The package


def numbers(rng: random.Random, count: int, around: list[float] | None = None) -> list[float]:
    """Log-probs that are exact in float32, near those of `around`."""
    return [round(1024 * ((around[t] if around else -2.0) + rng.uniform(-1, 1))) / 1024 for t in range(count)]


def near(rng: random.Random, engine: list[float]) -> tuple[list[float], list[float], list[float]]:
    """(new, old, engine): the log-probs of a reply."""
    old = numbers(rng, len(engine), engine)
    return numbers(rng, len(engine), old), old, engine


def attempt(rng: random.Random, number: int, outcome: float) -> tuple[Attempt, list[float]]:
    """An attempt of one or two turns, and the engine's log-probs of its tokens."""
    parts = [numbers(rng, rng.randint(1, 4)) for _ in range(rng.randint(1, 2))]
    replies = [Completion((9,) * len(part), tuple(part), "stop", 0) for part in parts]
    seen: list[tuple[int, ...]] = [(8, 8)] * (len(parts) - 1) + [()]
    turns = tuple(Turn(reply, "", None, "", ids) for reply, ids in zip(replies, seen, strict=True))
    prompt = (1, 3, 2) if number else (1, 2)
    made = Attempt(number, prompt, (1, 2), turns, outcome, outcome == 1.0, "", "done")
    return made, [logprob for part in parts for logprob in part]


def drawn(seed: int) -> tuple[list[Episode], dict[str, Reply]]:
    """Random episodes, some of tasks with a single one, and the same as replies."""
    rng = random.Random(seed)
    episodes, replies = list[Episode](), dict[str, Reply]()
    for task_number in range(TASKS):
        task = Task(f"t{task_number}", "t", "train", "")
        for index in range(1 if task_number % 3 == 2 else EPISODES):
            outcomes = list[float]()
            while len(outcomes) < ROUNDS and 1.0 not in outcomes:
                outcomes.append(rng.choice(OUTCOMES))
            attempts, critiques = list[Attempt](), list[Critique]()
            for number, outcome in enumerate(outcomes):
                made, engine = attempt(rng, number, outcome)
                attempts.append(made)
                name = f"{task.task_id}#{index}/{number}/{'revision' if number else 'attempt'}"
                replies[name] = Reply(task.task_id, number, False, outcome, *near(rng, engine))
                if number + 1 == len(outcomes):
                    continue
                engine = numbers(rng, rng.randint(1, 5))
                written = Completion((7,) * len(engine), tuple(engine), "stop", 0)
                critiques.append(Critique(number, (4, 5), written, ""))
                following = outcomes[number + 1]
                reward = 1.0 if following == 1.0 else following - outcome
                name = f"{task.task_id}#{index}/{number}/critique"
                replies[name] = Reply(task.task_id, number, True, reward, *near(rng, engine))
            episodes.append(Episode(task, index, tuple(attempts), tuple(critiques)))
    return episodes, replies


def gradients(episodes: list[Episode], replies: dict[str, Reply], settings: Settings) -> dict[str, list[float]]:
    """The same gradients from the package: credit, packing in several micro-batches, and the loss of each token."""
    algo = settings.algo
    report = credit(headers_of(episodes), algo, train_critic=True)
    by_id = {f"{e.task.task_id}#{e.index}": e for e in episodes}
    tokens = {s.sample_id: tokens_of(by_id[s.episode_id()], s.role, s.round, algo) for s in report.samples}
    plan = pack(lay_out(report.samples, algo, micro_batch_tokens=30, counted=len(report.counted)), tokens)
    cap = algo.mismatch_correction.cap if algo.mismatch_correction.enabled else None
    head = HeadPlan(_terms(settings), VocabShard(0, 10, 10, None), Chunking(), cap)
    found: dict[str, list[float]] = {name: [0.0] * len(reply.new) for name, reply in replies.items()}
    for batch in plan.updates[0]:
        owners = [plan.samples[i].sample_id for i in batch.sample_index_L]
        places = [owners[:i].count(owner) for i, owner in enumerate(owners)]
        old_L, new_L = (
            torch.tensor([getattr(replies[o], which)[t] for o, t in zip(owners, places, strict=True)]).double()
            for which in ("old", "new")
        )
        streams = _streams(batch, Frozen(old_L=old_L), head, torch.device("cpu"))
        new_L.requires_grad_()
        token_objective(new_L, torch.zeros_like(new_L), streams, head.terms).loss_L.sum().backward()
        assert new_L.grad is not None
        for owner, place, value in zip(owners, places, new_L.grad.tolist(), strict=True):
            found[owner][place] = value
    return found


@pytest.mark.parametrize(("name", "override"), list(variants()))
def test_gradients_of_a_step_are_those_of_the_re_implementation(name: str, override: str) -> None:
    settings = preset(name, *([override] if override else []))
    algo = settings.algo
    options = {
        "by_round": algo.group_by == "task_round_role",
        "pseudo": algo.pseudo_positive,
        "pseudo_alone": algo.pseudo_positive_alone,
        "filter": algo.group_filter.enabled,
        "count_masked": algo.group_filter.counted,
        "weigh_all": algo.mismatch_correction.enabled,
    }
    changes = 0
    for seed in range(8):
        episodes, replies = drawn(seed)
        found, expected = gradients(episodes, replies, settings), published_gradients(replies, options)
        for reply, values in expected.items():
            assert found[reply] == pytest.approx(values, rel=2e-6, abs=1e-9), (seed, reply)
        changes += expected != published_gradients(replies, OPTIONS_OF[name])
    # Each of these settings matters for these episodes, unless it needs another one that this preset does not have.
    inert = ("rollout.repeats_over_invalid",)
    inert += ("algo.pseudo_positive_alone", "algo.group_filter.counted") if name == "paper" else ()
    assert (changes > 0) == (override != "" and override.partition("=")[0] not in inert)


NAMES = ("by_round", "pseudo", "pseudo_alone", "filter", "count_masked", "weigh_all")
OPTIONS_OF = {"paper": dict.fromkeys(NAMES, False), "reference": dict.fromkeys(NAMES, True)}


# Repeats


class Endless:
    """Accepts every action and never ends. A reply of "none" has no action."""

    max_turns = 12

    async def reset(self) -> str:
        return "begin"

    def parse(self, reply: str) -> str | None:
        return None if reply.split()[0] == "none" else reply.split()[0]

    def hint(self) -> str:
        return "begin"

    async def step(self, action: str) -> StepResult:
        return StepResult("begin", False)

    def outcome(self) -> float:
        return 0.0

    def success(self) -> bool:
        return False

    def summary(self) -> str:
        return "begin"


@pytest.mark.parametrize("name", ["paper", "reference"])
def test_repeats_end_an_attempt_where_the_re_implementation_says(name: str) -> None:
    rollout = preset(name).rollout
    settings: RolloutSettings = replace(rollout, rounds=1, templates="compact", context_tokens=400, max_turn_tokens=4)
    prompter = Prompter(build_tokenizer(["a", "b", "none", "begin", *template_words("compact")]), settings)
    setup = EpisodeSetup(lambda task: Endless(), prompter, settings)
    rng, repeated, different = random.Random(1), 0, 0
    for _ in range(60):
        actions = [rng.choice(("a", "a", "b", None, None)) for _ in range(Endless.max_turns)]
        said = iter([action or "none" for action in actions])

        class Solver:
            async def reply(self, ask: Ask, said: Iterator[str] = said) -> Completion:
                ids = prompter.encode_reply(next(said))
                return Completion(ids, (-1.0,) * len(ids), "stop", 0)

        speakers = Speakers(Solver(), EmptyCritic())
        task = Task("t", "t", "train", "")
        episode = asyncio.run(play_episode(task, 0, setup, lambda task, index, s=speakers: s, Seeds(0, 0)))
        assert isinstance(episode, Episode)
        (attempt,) = episode.attempts
        turns, ended = published_length(actions, 3, skip_invalid=name == "reference")
        assert (len(attempt.turns), attempt.stop_reason) == (turns, "repeated" if ended else "max_turns")
        repeated += ended
        different += published_length(actions, 3, True) != published_length(actions, 3, False)
    assert 10 < repeated < 60 and different > 10
