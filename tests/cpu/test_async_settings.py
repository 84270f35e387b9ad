"""Settings of asynchronous rollouts that are refused before a model is loaded, and the file of unfinished groups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.engines.kind import EngineKind
from icrl_megatron.rollout.async_source import Order
from icrl_megatron.rollout.lead import Lead
from icrl_megatron.rollout.open_group import OpenGroup, begun_line, group_lines, read, share_of
from icrl_megatron.rollout.replay import Logged, ReplayLog
from icrl_megatron.run.checks import validate_settings
from icrl_megatron.run.rollout_checks import check_own_gpus
from icrl_megatron.settings.loading import load
from icrl_megatron.types import Completion, Task
from icrl_megatron.utils.errors import ConfigError

CORRECTED = "algo.mismatch_correction.enabled=true"
INTERLEAVED = ["rollout.staleness=1", CORRECTED, "rollout.interleave=true"]
REMOTE = ["engine.kind=sglang", "engine.urls=[http://h:1]"]


class NotPausable(EngineKind):
    """An engine whose weights cannot change in flight."""


KIND = NotPausable()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.staleness=1"], "mismatch_correction"),
        (["rollout.staleness=1", CORRECTED, "rollout.oversample=1.5"], "rollout.oversample=1"),
        (["rollout.staleness=1", CORRECTED, "debug.mode=fake_data"], "debug.mode=fake_data"),
        (["rollout.staleness=1", CORRECTED, "launch.device=cuda"], "engine.urls"),
        (["rollout.staleness=1", CORRECTED, f"engine.kind={__name__}:KIND"], "engine.kind=sglang"),
        (["rollout.staleness=65", CORRECTED], "rollout.staleness"),
        (["rollout.staleness=-1"], "rollout.staleness"),
        (["engine.keep_cache=true"], "engine.keep_cache"),
        (["rollout.interleave=true"], "rollout.staleness=1"),
        ([*INTERLEAVED, *REMOTE], r"engine\.urls.*set it to false"),
        ([*INTERLEAVED, "engine.keep_cache=true"], "engine.keep_cache=false"),
        ([*INTERLEAVED, "rollout.critic=frozen"], r"rollout\.interleave=false"),
        ([*INTERLEAVED, "launch.device=cuda"], r"engine\.kind=sglang"),
    ],
)
def test_wrong_combinations_have_a_remedy(overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    with pytest.raises(ConfigError, match=said):
        validate_settings(load("rulebook_easy", overrides))


@pytest.mark.parametrize("overrides", [["rollout.staleness=4", CORRECTED], INTERLEAVED])
def test_an_asynchronous_run_is_accepted(overrides: list[str]) -> None:
    validate_settings(load("rulebook_easy", overrides))


def test_engines_on_the_actors_gpus_take_turns_with_it() -> None:
    settings = load("rulebook_easy", [*INTERLEAVED, "engine.kind=sglang"])
    check_own_gpus(settings, "cuda")
    with pytest.raises(ConfigError, match=r"rollout\.interleave=true"):
        check_own_gpus(replace(settings, rollout=replace(settings.rollout, interleave=False)), "cuda")


def group(number: int) -> OpenGroup:
    reply = Completion((3, 4), (-0.1, -2.5), "stop", 2, ((1, 1),))  # type: ignore[arg-type]
    log = {0: ReplayLog([Logged.of((9, 8), reply)]), 3: ReplayLog()}  # type: ignore[arg-type]
    return OpenGroup(number, Task(f"t/train/{number % 3}", "t", "train", "ü"), 30, version=number, logs=log)


def test_unfinished_groups_round_trip(tmp_path: Path) -> None:
    """Also two groups of the same task."""
    path = tmp_path / "replay.jsonl"
    assert read(path) is None
    groups = tuple(map(group, range(4, 9)))
    path.write_text("\n".join([*group_lines(groups[:2]), begun_line(9), *group_lines(groups[2:])]))
    saved = read(path)
    assert saved is not None and (saved.begun, saved.groups) == (9, groups)


@pytest.mark.parametrize("line", ["{", '{"begun": "x"}', '{"begun": 3}\n{"log": "{}"}'])
def test_a_damaged_file_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "replay.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=r"replay\.jsonl.*rollout\.staleness=0"):
        read(tmp_path / "replay.jsonl")


@given(st.lists(st.integers(0, 99), unique=True), st.integers(1, 5))
def test_every_group_has_one_rank(numbers: list[int], count: int) -> None:
    groups = [group(n) for n in numbers]
    parts = [share_of(groups, index, count) for index in range(count)]
    assert sorted(g.number for part in parts for g in part) == sorted(numbers)
    assert share_of(groups, None, count) == []


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 5), st.data())
def test_no_more_begins_than_can_be_trained_on(steps: int, per_step: int, staleness: int, data: st.DataObject) -> None:
    lead = Lead(per_step, staleness)
    order = Order(lambda n: group(n).task, per_step, steps, staleness, lambda step: 1)
    begun = gone = 0
    for step in range(steps):
        gone += data.draw(st.integers(0, 3))  # dropped ones are replaced
        if begun > gone:
            lead.adapt(data.draw(st.integers(0, begun - gone)))
        begun = max(begun, order.limit(gone, step, lead.groups))
        assert gone + per_step <= begun <= gone + (staleness + 1) * per_step, (
            "a step can be filled, and the lead is bounded"
        )
        gone += per_step
    assert begun <= gone


def test_only_as_many_groups_are_ahead_as_the_actor_needs() -> None:
    lead = Lead(per_step=8, most=4)
    for complete in (8, 16, 8):  # rollouts are faster than training
        lead.adapt(complete)
    assert lead.groups == 8
    grown = []
    for _ in range(5):  # the actor waits
        lead.adapt(7)
        grown.append(lead.groups)
    assert grown == [16, 24, 32, 32, 32]
    shrunk = []
    for _ in range(5):  # they are faster again: all are complete when a step takes its own
        lead.adapt(lead.groups)
        shrunk.append(lead.groups)
    assert shrunk == [24, 20, 18, 17, 17]
    assert Lead(8, 0).groups == 0
