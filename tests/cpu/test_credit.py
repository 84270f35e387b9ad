"""Episodes -> samples -> advantages, against values calculated by hand from the paper's equations."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.algo.credit import advantages, credit
from icrl_megatron.algo.headers import EpisodeHeader, headers_of
from icrl_megatron.algo.samples import to_samples, tokens_of
from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.settings.algo_schema import AlgoSettings, Calibration, GroupFilter, Overlong
from icrl_megatron.settings.presets import apply_preset
from icrl_megatron.settings.schema import RolloutSettings, Settings
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.telemetry.metrics import rollout_metrics
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Sample, Task, Turn
from icrl_megatron.utils.errors import ConfigError


def completion(ids: tuple[int, ...]) -> Completion:
    return Completion(ids, tuple(-0.1 * i for i in ids), "stop", weight_version=3)


def attempt(round: int, outcome: float, replies: tuple[tuple[int, ...], ...] = ((1, 2), (3,))) -> Attempt:
    """Two turns by default, with the observation (90, 91) between them."""
    last = len(replies) - 1
    turns = tuple(
        Turn(completion(ids), "text", "go", "" if i == last else "seen", () if i == last else (90, 91))
        for i, ids in enumerate(replies)
    )
    prompt = (50, 51) if round == 0 else (50, 77, 51)
    return Attempt(round, prompt, (50, 51), turns, outcome, outcome == 1.0, "it ended", "done")


def episode(index: int, outcomes: list[float], task_id: str = "maze/train/0") -> Episode:
    attempts = tuple(attempt(k, r) for k, r in enumerate(outcomes))
    critiques = tuple(Critique(k, (60, 61), completion((7, 8)), "try left") for k in range(len(outcomes) - 1))
    return Episode(Task(task_id, "maze", "train", "0"), index, attempts, critiques)


def by_id(samples: tuple[Sample, ...] | list[Sample]) -> dict[str, Sample]:
    return {s.sample_id.rsplit("#", 1)[1]: s for s in samples}


def test_an_episode_gives_samples_with_ids_masks_and_rewards() -> None:
    played = episode(4, [0.0, 1.0])
    samples = by_id(to_samples(EpisodeHeader.of(played), AlgoSettings(), train_critic=True))
    assert list(samples) == ["4/0/attempt", "4/0/critique", "4/1/revision"]

    for s in samples.values():
        of = tokens_of(played, s.role, s.round, AlgoSettings())
        prompts = s.behaviour_prompt_tokens, s.train_prompt_tokens
        assert prompts == (len(of.behaviour_prompt_ids), len(of.train_prompt_ids))
        assert (s.response_tokens, s.loss_tokens) == (len(of.response_ids), sum(of.loss_mask))
        assert s.same_prompt == (of.train_prompt_ids.tolist() == of.behaviour_prompt_ids.tolist())
    first, critique, revision = (tokens_of(played, s.role, s.round, AlgoSettings()) for s in samples.values())
    assert first.train_prompt_ids.tolist() == first.behaviour_prompt_ids.tolist() == [50, 51]
    assert first.response_ids.tolist() == [1, 2, 90, 91, 3]
    assert first.loss_mask.tolist() == [True, True, False, False, True]
    assert first.rollout_logprobs.tolist() == pytest.approx((-0.1, -0.2, 0.0, 0.0, -0.3))
    assert critique.train_prompt_ids.tolist() == critique.behaviour_prompt_ids.tolist() == [60, 61]
    assert (critique.response_ids.tolist(), critique.loss_mask.tolist()) == ([7, 8], [True, True])
    assert [list(i) for i in (revision.behaviour_prompt_ids, revision.train_prompt_ids)] == [[50, 77, 51], [50, 51]]
    assert samples["4/0/critique"].reward == samples["4/1/revision"].reward == 1.0
    assert [s.calibrated for s in samples.values()] == [False, False, True]


def test_ablations_change_only_the_revision() -> None:
    variants = (AlgoSettings(), AlgoSettings(calibration=Calibration(enabled=False)), AlgoSettings(internalise=False))
    found = [by_id(to_samples(EpisodeHeader.of(episode(0, [0.0, 0.5])), algo, True)) for algo in variants]
    paper, no_weight, no_internalising = found
    revision = replace(paper["0/1/revision"], calibrated=False)
    assert no_weight["0/1/revision"] == revision
    assert no_internalising["0/1/revision"] == replace(revision, train_prompt_tokens=3, same_prompt=True)
    for same in ("0/0/attempt", "0/0/critique"):
        assert paper[same] == no_weight[same] == no_internalising[same]


def test_a_frozen_critic_is_not_trained() -> None:
    samples = by_id(to_samples(EpisodeHeader.of(episode(0, [0.0, 0.0, 1.0])), AlgoSettings(), train_critic=False))
    assert list(samples) == ["0/0/attempt", "0/1/revision", "0/2/revision"]


@pytest.mark.parametrize(
    ("before", "after", "reward"), [(0.2, 1.0, 1.0), (0.25, 0.75, 0.5), (0.75, 0.25, -0.5), (0.5, 0.5, 0.0)]
)
def test_a_critique_is_rewarded_with_the_improvement(before: float, after: float, reward: float) -> None:
    samples = by_id(to_samples(EpisodeHeader.of(episode(0, [before, after])), AlgoSettings(), True))
    assert samples["0/0/critique"].reward == reward


def test_samples_are_grouped_by_the_setting() -> None:
    two_revisions = episode(0, [0.0, 0.0, 1.0])

    def groups(group_by: str) -> list[set[str]]:
        members: dict[str, set[str]] = {}
        for s in to_samples(EpisodeHeader.of(two_revisions), AlgoSettings(group_by=group_by), True):
            members.setdefault(s.group, set()).add(s.sample_id.split("/", 3)[-1])
        return sorted(members.values(), key=sorted)

    attempts, critiques = {"0/attempt", "1/revision", "2/revision"}, {"0/critique", "1/critique"}
    assert groups("task_role") == [attempts, critiques]
    assert groups("task") == [attempts | critiques]
    assert groups("task_round_role") == [{m} for m in sorted(attempts | critiques)]


def test_advantages_are_those_of_equation_5() -> None:
    # Solver group of the task: 0, 1 (revision), 0, 0.5 (revision), 1. Mean 0.5, squares 0.25 * 4 = 1, std sqrt(1 / 4).
    # Critic group: 1, 0.5. Mean 0.75, squares 2 * 0.0625 = 0.125, std sqrt(0.125).
    played = [episode(0, [0.0, 1.0]), episode(1, [0.0, 0.5]), episode(2, [1.0])]
    report = credit(headers_of(played), AlgoSettings(), True)
    got = {k: s.advantage for k, s in by_id(report.samples).items()}
    solver, critic = 0.5 / (0.5 + 1e-6), 0.25 / (math.sqrt(0.125) + 1e-6)
    expected = {"0/0/attempt": -solver, "0/0/critique": critic, "0/1/revision": solver, "2/0/attempt": solver}
    expected |= {"1/0/attempt": -solver, "1/0/critique": -critic, "1/1/revision": 0.0}
    assert got == pytest.approx(expected)
    assert (report.groups, report.flat_groups, report.dropped_groups) == (2, 0, 0)
    assert report.has_signal


def alone(rewards: list[float], **settings: bool) -> list[float]:
    """Advantages of one group."""
    return advantages(np.array([rewards]), AlgoSettings(**settings))[0].tolist()


def test_a_pseudo_positive_reward_is_added_if_all_attempts_failed() -> None:
    # 0, 0, 0 and the pseudo reward 1: mean 1/4, sample variance (3 * 1/16 + 9/16) / 3 = 1/4.
    assert alone([0.0, 0.0, 0.0], pseudo_positive=True) == pytest.approx([-0.25 / 0.500001] * 3)
    assert alone([1.0, 1.0], pseudo_positive=True) == [0.0, 0.0]
    assert alone([0.0], pseudo_positive=True) == [0.0]
    # Alone, 0 and the pseudo reward: mean 1/2, sample variance 1/2.
    assert alone([0.0], pseudo_positive=True, pseudo_positive_alone=True) == pytest.approx([-0.5 / (0.5**0.5 + 1e-6)])
    assert alone([1.0], pseudo_positive=True, pseudo_positive_alone=True) == [0.0]
    assert alone([0.0], pseudo_positive_alone=True) == [0.0]  # there is no pseudo reward


def test_advantages_without_division_by_the_deviation() -> None:
    assert alone([0.0, 1.0, 0.5], normalise_std=False) == pytest.approx([-0.5, 0.5, 0.0])


def test_equal_rewards_give_advantages_of_0_and_no_signal() -> None:
    assert alone([0.7]) == [0.0]
    assert alone([0.3 - 0.1, 0.4 - 0.2, 0.5 - 0.3]) == [0.0] * 3  # equal except for rounding
    report = credit(headers_of([episode(i, [0.0, 0.0]) for i in range(4)]), AlgoSettings(), True)
    assert not report.has_signal
    assert report.flat_groups == report.groups == 2
    assert len(report.samples) == 12  # they still count in the batch's normaliser


def test_first_with_signal_returns_the_first_tasks_that_have_one() -> None:
    outcomes = {"a": (1.0, 1.0), "d": (0.0, 1.0), "c": (0.0, 0.0), "b": (1.0, 0.0)}
    episodes = [episode(i, [o], task_id=task) for task, of in outcomes.items() for i, o in enumerate(of)]
    report = credit(headers_of(episodes), AlgoSettings(), train_critic=True)
    order = [e.task for e in episodes]
    for count, tasks in ((1, {"d"}), (2, {"d", "b"}), (3, {"d", "b"})):
        first = report.first_with_signal(count, order)
        assert {s.task_id() for s in first.samples} == first.tasks_with_signal() == tasks
        assert all(s in report.samples for s in first.samples) and first.groups == report.groups
    flat = credit(headers_of(episodes[4:6]), AlgoSettings(), train_critic=True)
    assert flat.first_with_signal(1, order) == flat and flat.samples  # algo.on_no_signal then decides


def test_counted_samples_are_those_of_the_chosen_tasks_with_generated_tokens() -> None:
    settings = apply_preset(Settings(), "reference").algo
    episodes = [episode(i, [0.0, 0.0], task) for task in "ab" for i in range(2)]
    first, second = episodes[0].attempts
    silent = replace(episodes[0], attempts=(first, replace(second, turns=())))
    report = credit(headers_of([silent, *episodes[1:]]), settings, True)
    assert report.dropped_samples == 8 and len(report.counted) == 7
    first = report.first_with_signal(1, [episodes[2].task])
    assert {s.task_id() for s in (*first.samples, *first.counted)} == {"b"} and len(first.counted) == 4
    removed = replace(settings, group_filter=replace(settings.group_filter, counted=False))
    whole = credit(headers_of(episodes), settings, True)
    assert credit(headers_of(episodes), removed, True) == replace(whole, counted=())


def test_a_sample_without_loss_tokens_counts_in_its_group_but_gives_no_signal() -> None:
    def silent(index: int, outcome: float) -> Episode:
        e = episode(index, [outcome])
        return replace(e, attempts=(replace(e.attempts[0], turns=()),))

    report = credit(headers_of([silent(0, 0.0), silent(1, 1.0)]), AlgoSettings(), True)
    assert [s.loss_tokens for s in report.samples] == [0, 0]
    assert all(s.advantage != 0.0 for s in report.samples)
    assert not report.has_signal


def test_the_references_group_filter_needs_a_success_and_a_mean_of_0_3() -> None:
    settings = apply_preset(Settings(), "reference").algo
    # Revisions 0, 0, 1: mean 1/3 >= 0.3, kept; first attempts all failed and are never filtered.
    lucky = [episode(i, [0.0, r]) for i, r in enumerate([0.0, 0.0, 1.0])]
    assert credit(headers_of(lucky), settings, True).dropped_groups == 0
    # 0, 0, 0, 1: a success, but the mean is 0.25; both the critics' and the revisions' group go.
    poor = [episode(i, [0.0, r]) for i, r in enumerate([0.0, 0.0, 0.0, 1.0])]
    report = credit(headers_of(poor), settings, True)
    assert (report.groups, report.dropped_groups, report.dropped_samples) == (3, 2, 8)
    assert {s.role for s in report.samples} == {"attempt"}
    assert len(report.counted) == 8 and not {s.role for s in report.counted} & {"attempt"}
    # 0.9, 0.9: a high mean without a success.
    near = [episode(i, [0.0, 0.9]) for i in range(2)]
    assert credit(headers_of(near), settings, True).dropped_groups == 2


def test_the_overlong_penalty_is_subtracted_before_the_baseline() -> None:
    """Replies of 3, 5 and 10 generated tokens, with the penalty from 4 to 8; observations do not count."""
    replies = (((1, 2), (3,)), ((1, 2), (3, 4, 5)), ((1,) * 6, (2,) * 4))
    episodes = [replace(episode(i, [1.0]), attempts=(attempt(0, 1.0, of),)) for i, of in enumerate(replies)]
    settings = AlgoSettings(normalise_std=False, overlong=Overlong(max_tokens=8, buffer_tokens=4, factor=0.8))
    report = credit(headers_of(episodes), settings, True)
    assert [s.loss_tokens for s in report.samples] == [3, 5, 10]
    assert [s.reward for s in report.samples] == [1.0] * 3  # the logged reward is the environment's
    mean = (0.2 + 0.8) / 3
    assert [s.advantage for s in report.samples] == pytest.approx([mean, mean - 0.2, mean - 0.8])
    assert rollout_metrics(headers_of(episodes), (), report)["reward/overlong_penalty"] == pytest.approx(mean)
    without = credit(headers_of(episodes), AlgoSettings(), True)
    assert without.flat_groups == 1
    assert "reward/overlong_penalty" not in rollout_metrics(headers_of(episodes), (), without)


def test_a_preset_changes_only_the_settings_that_it_names() -> None:
    algo = AlgoSettings(clip_high=0.3, group_filter=GroupFilter(enabled=True))
    start = Settings(algo=algo, rollout=RolloutSettings(max_turns=7))
    paper, reference = apply_preset(start, "paper"), apply_preset(start, "reference")
    assert paper == replace(start, algo=AlgoSettings(clip_high=0.3))
    assert reference.algo.group_by == "task_round_role" and reference.algo.pseudo_positive
    assert reference.algo.group_filter.enabled and reference.algo.mismatch_correction.enabled
    assert (reference.algo.clip_high, reference.rollout.max_turns) == (0.3, 7)
    assert apply_preset(reference, "paper") == paper
    with pytest.raises(ConfigError, match="papper"):
        apply_preset(start, "papper")


@pytest.mark.parametrize("outcome", [float("nan"), float("inf"), -0.1, 1.5])
def test_rewards_outside_0_to_1_are_refused(outcome: float) -> None:
    with pytest.raises(ConfigError, match=r"maze/train/0.*\[0, 1\]"):
        credit(headers_of([episode(0, [outcome])]), AlgoSettings(), True)


def test_duplicate_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="maze/train/0#0/0/attempt"):
        credit(headers_of([episode(0, [0.0]), episode(0, [1.0])]), AlgoSettings(), True)


outcomes = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=3)


@given(plays=st.lists(outcomes, min_size=1, max_size=8), tasks=st.integers(1, 3), seed=st.randoms())
def test_every_group_has_mean_0_and_deviation_1_in_any_order(plays, tasks, seed) -> None:
    episodes = [episode(i, r, f"maze/train/{t}") for t in range(tasks) for i, r in enumerate(plays)]
    report = credit(headers_of(episodes), AlgoSettings(), True)
    shuffled = list(episodes)
    seed.shuffle(shuffled)
    assert credit(headers_of(shuffled), AlgoSettings(), True) == report

    groups: dict[str, list[float]] = {}
    for s in report.samples:
        groups.setdefault(s.group, []).append(s.advantage)
    for values in groups.values():
        assert sum(values) == pytest.approx(0.0, abs=1e-6)
        if any(values):
            assert sum(v * v for v in values) / (len(values) - 1) == pytest.approx(1.0, rel=1e-3)


rewards = st.sampled_from([0.0, 0.1, 0.1 + 2e-9, 1 / 3, 0.7, 1.0]) | st.floats(0.0, 1.0)
variants = st.fixed_dictionaries(
    {name: st.booleans() for name in ("normalise_std", "pseudo_positive", "pseudo_positive_alone")}
)


@given(groups=st.lists(st.lists(rewards, min_size=1, max_size=20), min_size=1, max_size=8), variant=variants)
def test_advantages_are_those_of_each_group_alone_to_the_last_bit(groups, variant) -> None:
    """Groups of one size are computed together; the result may not depend on the other groups of the step."""
    numbered = ((g, i, reward) for g, of in enumerate(groups) for i, reward in enumerate(of))
    episodes = [episode(100 + i, [reward], f"maze/train/{100 + g}") for g, i, reward in numbered]
    found = credit(headers_of(episodes), AlgoSettings(**variant), True)
    by_hand: list[float] = []
    for group in groups:
        values = np.array([*group, 1.0] if variant["pseudo_positive"] else group)
        few = len(values if variant["pseudo_positive_alone"] else group) < 2
        if few or values.max() - values.min() < 1e-8:
            by_hand += [0.0] * len(group)
            continue
        divisor = np.std(values, ddof=1) + 1e-6 if variant["normalise_std"] else 1.0
        by_hand += [float((reward - np.mean(values)) / divisor) for reward in group]
    assert [s.advantage for s in found.samples] == by_hand
    assert found.flat_groups == sum(not any(alone(group, **variant)) for group in groups)


def problems(name: str, n: int) -> list[Task]:
    return [Task(f"{name}/train/{i}", name, "train", str(i)) for i in range(n)]


def test_a_draw_depends_only_on_seed_step_and_resample() -> None:
    sources = [TaskSource("a", 3.0), TaskSource("b", 1.0)]
    pool = {"a": problems("a", 10), "b": problems("b", 5)}
    forward, late = TaskSampler(sources, pool, seed=1), TaskSampler(sources, pool, seed=1)
    steps = [forward.draw(s, 0, 4) for s in range(20)]
    assert late.draw(19, 0, 4) == steps[19]
    assert late.draw(3, 2, 4) == forward.draw(3, 2, 4) != steps[3]
    assert TaskSampler(sources, pool, seed=2).draw(0, 0, 4) != steps[0]
    for tasks in steps:
        assert [t.source for t in tasks].count("a") == 3
        assert len({t.task_id for t in tasks}) == 4
    drawn = [t.task_id for tasks in steps for t in tasks]
    assert {drawn.count(t.task_id) for t in pool["a"]} == {6}  # 60 draws of 10 problems
    assert {drawn.count(t.task_id) for t in pool["b"]} == {4}


def test_a_sampler_uses_no_more_memory_after_many_steps() -> None:
    sampler = TaskSampler([TaskSource("a", 2.0), TaskSource("b")], {s: problems(s, 3) for s in "ab"}, seed=0)
    sizes = []
    for step in (100, 10_000):
        sampler.draw(step, 0, 4)
        sizes.append(len(pickle.dumps(sampler)))
    assert abs(sizes[1] - sizes[0]) < 64


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.1, 10.0), min_size=3, max_size=3),
    n=st.integers(1, 12),
    resample=st.integers(0, 2),
)
def test_a_draw_repeats_a_task_only_if_the_source_has_too_few(sizes, weights, n, resample) -> None:
    names = "xyz"[: len(sizes)]
    sources = [TaskSource(name, w) for name, w in zip(names, weights, strict=False)]
    pool = {name: problems(name, size) for name, size in zip(names, sizes, strict=True)}
    sampler = TaskSampler(sources, pool, seed=0)
    for step in range(5):
        tasks = sampler.draw(step, resample, n)
        assert len(tasks) == n
        for name in names:
            drawn = [t.task_id for t in tasks if t.source == name]
            assert len(set(drawn)) == min(len(drawn), len(pool[name]))
