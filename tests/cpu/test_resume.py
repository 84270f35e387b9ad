"""Which settings may change when a run resumes, why others may not, and the record of changes in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from begun_run import again, begin, write_rows

from icrl_megatron.run.checks import validate
from icrl_megatron.run.heldout import problems
from icrl_megatron.run.resume import RULES, adopt, check_resume, earlier, rule_of
from icrl_megatron.settings import loading as S
from icrl_megatron.settings.task_options import MathSource
from icrl_megatron.utils.errors import ConfigError


def leaves() -> list[str]:
    """Every setting that is not a section."""
    known = S.field_types()
    return [name for name in known if not any(other.startswith(f"{name}.") for other in known)]


def test_every_setting_has_a_rule_and_every_rule_a_setting() -> None:
    assert set(RULES) <= set(S.field_types())
    used = {id(rule_of(name)) for name in leaves()}
    assert {id(rule) for rule in RULES.values()} == used


@pytest.mark.parametrize(
    "override",
    [
        "algo.on_no_signal=skip",
        "algo.max_resamples=9",
        "rollout.context_tokens=600",
        "rollout.episodes_per_task=12",
        "tasks.sources=[{name: household, weight: 2}, {name: rulebook_easy}]",
        "tasks.limit=100",
        "tasks.curriculum=true",
        "tasks.too_long=drop",
        "eval.interval=3",
        "checkpoint.interval=7",
        "engine.max_batch=8",
        "launch.ranks=4",
        "actor.tensor_parallel=1",
        "optim.learning_rate=0.5",
        "optim.on_collapse=stop",
        "steps=999",
    ],
)
def test_allowed_changes_are_adopted_and_reported(tmp_path: Path, override: str) -> None:
    begin(tmp_path)
    validate(again(tmp_path, override))
    (line, *_) = adopt(again(tmp_path, override), tmp_path)
    name = override.partition("=")[0]
    assert line.startswith(f"resume: {name}") and line.endswith("after step 4")
    assert S.load_saved(tmp_path / S.SAVED_NAME) == again(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("model.init.layers=3", "the checkpoints hold the weights of this model"),
        ("seed=9", "could not be reproduced"),
        ("data.seed=9", "could not be reproduced"),
        ("warm_start.steps=900", "the warm start is over"),
        ("rollout.rounds=3", "part of the algorithm"),
        ("rollout.temperature=0.9", "trained to sample at this temperature"),
        ("algo.clip_high=0.5", "part of the algorithm"),
        ("actor.precision=bf16", "computed in the other precision"),
        ("optim.beta2=0.9", "averages with this decay"),
        ("debug.mode=rollout_only", "some of the run's steps would be training"),
        ("start_from=elsewhere", "resumes from its own checkpoints"),
    ],
)
def test_forbidden_changes_are_rejected_with_reason_and_remedy(tmp_path: Path, override: str, why: str) -> None:
    begin(tmp_path)
    with pytest.raises(ConfigError) as caught:
        validate(again(tmp_path, override, "steps=9"))
    message, name = str(caught.value), override.partition("=")[0]
    assert f"{tmp_path} holds a run with other settings: {name} (was " in message
    assert why in message and "(steps may differ)" in message
    assert f"begin a new run with another run_dir; start_from={tmp_path / 'checkpoints'}" in message


def test_forbidden_change_is_reported_before_invalid_combinations(tmp_path: Path) -> None:
    """Otherwise the remedy for a combination could name a setting that cannot change."""
    begin(tmp_path)
    with pytest.raises(ConfigError, match=r"algo\.shaping_gamma \(was 0\.0, now 0\.1\): it is part of the algorithm"):
        validate(again(tmp_path, "algo.shaping_gamma=0.1"))


def test_every_change_is_recorded_once(tmp_path: Path) -> None:
    begun = begin(tmp_path)
    changed = again(tmp_path, "optim.learning_rate=0.5", "max_generated_tokens=7")
    assert adopt(changed, tmp_path) == [
        "resume: max_generated_tokens changes from null to 7 after step 4",
        f"resume: optim.learning_rate changes from {begun.optim.learning_rate} to 0.5 after step 4",
    ]
    assert adopt(changed, tmp_path) == []
    adopt(again(tmp_path, "optim.learning_rate=0.25"), tmp_path)
    (tmp_path / "checkpoints" / "step_999999").mkdir()
    adopt(again(tmp_path, "tasks.sources=[{name: household}]"), tmp_path)
    (tmp_path / "checkpoints" / "step_1000000").mkdir()
    adopt(again(tmp_path, "optim.learning_rate=0.125"), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "settings_changes.jsonl").read_text().splitlines()]
    assert [(r["step"], r["name"], r["old"], r["new"]) for r in rows[:4]] == [
        (4, "max_generated_tokens", None, 7),
        (4, "optim.learning_rate", begun.optim.learning_rate, 0.5),
        (4, "max_generated_tokens", 7, None),
        (4, "optim.learning_rate", 0.5, 0.25),
    ]
    assert {"tasks.sources.0.name", "tasks.sources.1.name"} <= {r["name"] for r in rows if r["step"] == 999_999}
    assert all(r["time"].endswith("Z") for r in rows)
    # The settings of the steps before each change, without settings that no step used.
    rate = begun.optim.learning_rate
    assert [s.optim.learning_rate for s in earlier(tmp_path)] == [rate, 0.25, rate]


def test_everything_may_change_before_the_first_step(tmp_path: Path) -> None:
    begun = S.load("quickstart", [f"run_dir={tmp_path}"])
    S.save(begun, tmp_path / S.SAVED_NAME)
    (tmp_path / "control_before.json").write_text("{}")
    (tmp_path / "warm_start" / "random").mkdir(parents=True)
    other = again(tmp_path, "seed=5", "model.init.layers=4", "rollout.rounds=3", "warm_start.steps=7")
    validate(other)
    assert adopt(other, tmp_path) == []
    assert not (tmp_path / "settings_changes.jsonl").exists()
    # Files from the earlier settings must not be reused.
    assert not (tmp_path / "control_before.json").exists() and not (tmp_path / "warm_start" / "random").exists()


def test_settings_of_later_phases_may_change(tmp_path: Path) -> None:
    begun = S.load("quickstart", [f"run_dir={tmp_path}"])
    S.save(begun, tmp_path / S.SAVED_NAME)
    (tmp_path / "warm_start" / "checkpoints" / "step_000050").mkdir(parents=True)
    (tmp_path / "warm_start" / "random").mkdir()
    changed = again(tmp_path, "warm_start.learning_rate=1", "algo.clip_high=0.5")
    check_resume(begun, changed, tmp_path)
    with pytest.raises(ConfigError, match="the checkpoints hold the weights of this model"):
        check_resume(begun, again(tmp_path, "model.init.layers=3"), tmp_path)
    (tmp_path / "warm_start" / "hf").mkdir()
    with pytest.raises(ConfigError, match="the warm start is over"):
        check_resume(begun, changed, tmp_path)
    check_resume(begun, again(tmp_path, "algo.clip_high=0.5"), tmp_path)
    changes = adopt(again(tmp_path, "algo.clip_high=0.5"), tmp_path)
    assert changes == ["resume: algo.clip_high changes from 0.28 to 0.5 after step 0"]
    assert (tmp_path / "warm_start" / "random").exists()


def test_run_with_steps_but_no_checkpoint_counts_as_begun(tmp_path: Path) -> None:
    begun = S.load("quickstart", [f"run_dir={tmp_path}"])
    S.save(begun, tmp_path / S.SAVED_NAME)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    check_resume(begun, again(tmp_path, "seed=5"), tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with pytest.raises(ConfigError, match="seed"):
        check_resume(begun, again(tmp_path, "seed=5"), tmp_path)


def test_rows_trained_on_before_a_change_cannot_be_held_out(tmp_path: Path) -> None:
    first, second, held = (write_rows(tmp_path / f"{name}.jsonl", start) for name, start in
                           (("first", 0), ("second", 10), ("held", 20)))  # fmt: skip
    run = tmp_path / "run"

    def sources(train: str, heldout: str) -> str:
        return f"tasks.sources=[{{name: math, data: {{train: [{train}], heldout: [{heldout}]}}}}]"

    begin(run, sources(first, held))
    validate(again(run, sources(second, held)))
    adopt(again(run, sources(second, held)), run)
    for settings in (again(run, sources(second, first)), again(run, sources(held, first))):
        with pytest.raises(ConfigError, match=r"first\.jsonl, line 1: this held-out problem is a training problem too"):
            validate(settings)
    asked = again(run, sources(second, first))
    asked.tasks.sources = [MathSource("math", data=asked.tasks.sources[0].data)]
    with pytest.raises(ConfigError, match="is a training problem too"):
        problems(asked, S.load_saved(run / S.SAVED_NAME), ("test",), None, earlier(run))
    Path(first).rename(tmp_path / "moved.jsonl")  # deleted rows cannot be compared
    validate(again(run, sources(second, str(tmp_path / "moved.jsonl"))))
