"""Two steps of the real program with each variant of training, and the files of a finished run."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from whole_runs import Batch, batch, from_model, icrl, train

from icrl_megatron import loop
from icrl_megatron.distributed.process import StopRequest
from icrl_megatron.run import state as state_module
from icrl_megatron.run.evaluator import Evaluator
from icrl_megatron.settings.arms import ARMS
from icrl_megatron.settings.schema import Settings
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.telemetry.writer import MetricsRow, read_rows
from icrl_megatron.utils.progress import Progress

TRAINED = ("actor/loss", "actor/grad_norm", "actor/entropy", "actor/mismatch_max", "tokens/loss")
CALIBRATION = ("actor/calibration_weight", "actor/calibration_at_max", "actor/calibration_under_half")

VARIANTS: dict[str, list[str]] = {
    "paper": [],
    "reference": ["algo.preset=reference"],
    "grpo": ["rollout.rounds=1"],
    "three_rounds": ["rollout.rounds=3"],
    "frozen_critic": ["rollout.critic=frozen"],
    "empty_critic": ["rollout.critic=empty"],
    "no_calibration": ["algo.calibration.enabled=false"],
    "not_internalised": ["algo.internalise=false"],
    "no_role_groups": ["algo.group_by=task"],
    "recomputed": ["algo.calibration.denominator=recomputed"],
    "whole_context": ["rollout.max_turn_tokens=null", "rollout.parse_truncated=true", "rollout.context_tokens=128"],
    "kl": ["algo.kl_coef=0.1", "optim.learning_rate=0.01"],
    "two_updates": ["algo.updates_per_step=2"],
    "corrected": ["algo.mismatch_correction.enabled=true"],
    "critique_grpo": list(ARMS["critique_grpo"].changes),
    "gspo": list(ARMS["gspo"].changes),
    "turn_stages": [
        *ARMS["grpo"].changes,
        "rollout.turn_stages=[{until_step: 1, turns: 1}]",
        "tasks.sources=[{name: two_turns}]",
    ],
    "token_mean": ["algo.loss_normalisation=token_mean"],
    "all_resampled": ["algo.max_resamples=2", "tasks.sources=[{name: flat}]"],
    "dynamic": ["algo.dynamic_sampling=true", "algo.max_resamples=4", "tasks.sources=[{name: half_flat}]"],
    "no_signal": ["algo.on_no_signal=error", "algo.max_resamples=1", "tasks.sources=[{name: flat}]"],
    "some_gradings_raise": ["tasks.sources=[{name: raises_often}]"],
    "some_rewards_are_nan": ["tasks.sources=[{name: nan_often}]"],
    "some_gradings_block": ["tasks.sources=[{name: blocks_often}]", "rollout.environment_timeout_s=0.2"],
    "all_gradings_raise": ["tasks.sources=[{name: raises}]"],
    "rollout_only": ["debug.mode=rollout_only"],
    "fake_data": ["debug.mode=fake_data", "rollout.max_turn_tokens=null"],
    "unsynced": [],
}


class Ran(Batch):
    def steps(self, name: str) -> list[MetricsRow]:
        """The rows of the training steps of a run that succeeded."""
        self.succeeded(name)
        found = self.trained(name)
        assert [row["step"] for row in found] == [1, 2]
        return found


@pytest.fixture(scope="module")
def ran(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("variants")
    start = [*from_model(finished_run), "steps=2", "eval.interval=0"]
    variants = VARIANTS | {"from_dump": ["debug.mode=from_dump", f"debug.dump={folder / 'rollout_only'}"]}
    commands = {name: train(folder / name, *start, *changes) for name, changes in variants.items()}
    # Last, because the damage stays in the process.
    commands["unsynced"] = ["unsynced", *commands.pop("unsynced")]
    return Ran(folder, batch(folder, commands))


WITHOUT_ONE_UPDATE = ("rollout_only", "no_signal", "all_gradings_raise", "unsynced", "fake_data", "two_updates", "gspo")
WITH_UPDATES = [name for name in VARIANTS if name not in WITHOUT_ONE_UPDATE]


@pytest.mark.parametrize("name", WITH_UPDATES)
def test_every_variant_makes_two_updates(ran: Ran, name: str) -> None:
    steps = ran.steps(name)
    for row in steps:
        assert all(math.isfinite(row[key]) for key in TRAINED)
        assert row["actor/mismatch_max"] <= 1e-4
        assert row["actor/skipped_updates"] == row["actor/non_finite"] == 0
    assert steps[0]["actor/ratio_deviation_max"] <= 1e-5
    assert steps[0]["actor/kl_old"] <= 1e-8
    assert [row["weights/version"] for row in steps] == [2, 3]


@pytest.mark.parametrize("name", [n for n in WITH_UPDATES if n not in ("all_resampled", "reference")])
def test_calibration_is_reported_where_it_applies(ran: Ran, name: str) -> None:
    without = ("grpo", "no_calibration", "not_internalised", "turn_stages")
    for row in ran.steps(name):
        assert (row["actor/calibrated"] > 0) == (name not in without)
        assert all((key in row) == (name not in without) for key in CALIBRATION)
        if name not in without:
            assert 0 < row["actor/calibration_weight"] <= 2
        # The mismatch compares log-probs under the same prompt, so revisions count only if that prompt was scored too.
        if name == "no_calibration":
            assert 0 < row["actor/mismatched"] < row["actor/tokens"]
        else:
            unmeasured = 0 if name == "recomputed" else row["actor/calibrated"]
            assert row["actor/mismatched"] == row["actor/tokens"] - unmeasured


def test_dynamic_sampling_draws_until_enough_tasks_have_a_signal(ran: Ran) -> None:
    """Half of the tasks never have one and are not trained on. The tokens of all batches are counted."""
    for row in ran.steps("dynamic"):
        assert 1 <= row["steps/resampled"] <= 4
        assert 16 < row["episodes/played"] <= 16 * (row["steps/resampled"] + 1)  # a task played twice counts once
        assert row["samples/count"] == 4 * 4 * 3 and row["steps/without_signal"] == 0
    total = ran.steps("dynamic")[-1]["tokens/generated_total"]
    assert total == sum(row["tokens/generated"] for row in ran.steps("dynamic"))


def test_recomputed_calibration_weights_equal_those_of_the_engine(ran: Ran) -> None:
    recomputed, from_engine = ran.steps("recomputed")[0], ran.steps("paper")[0]
    assert recomputed["actor/calibration_weight"] == pytest.approx(from_engine["actor/calibration_weight"], rel=1e-4)
    assert recomputed["tokens/generated"] == from_engine["tokens/generated"]


@pytest.mark.parametrize(("name", "trained"), [("paper", True), ("frozen_critic", False), ("empty_critic", False)])
def test_the_critic_is_trained_only_if_it_is_the_solver(ran: Ran, name: str, trained: bool) -> None:
    episodes, row = Rollouts(ran.folder / name).episodes(1), ran.steps(name)[0]
    attempts, critiques = (sum(len(getattr(e, of)) for e in episodes) for of in ("attempts", "critiques"))
    assert critiques > 0 and row["samples/count"] == attempts + critiques * trained
    assert (row["critique/tokens"] == 0) == (name == "empty_critic")


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_grpo_and_gspo_have_one_round(ran: Ran, name: str) -> None:
    for row in ran.steps(name):
        assert "reward/revision" not in row and "revision/gain" not in row
        assert row["samples/count"] == row["episodes/played"] == 16


def test_a_third_round_is_played_and_calibrated(ran: Ran) -> None:
    row = ran.steps("three_rounds")[0]
    assert "success/round_2" in row
    assert row["actor/calibrated"] > ran.steps("paper")[0]["actor/calibrated"]


def test_the_kl_to_the_reference_is_0_at_first_and_then_grows(ran: Ran) -> None:
    first, second = ran.steps("kl")
    assert abs(first["actor/kl_reference"]) <= 1e-8 and second["actor/kl_reference"] > 1e-6


@pytest.mark.parametrize("name", ["two_updates", "gspo"])
def test_the_second_update_of_a_step_has_ratios_other_than_1(ran: Ran, name: str) -> None:
    """Or the loss of GSPO would be GRPO's."""
    for row in ran.steps(name):
        assert row["actor/ratio_deviation_max"] > 1e-5 and row["actor/mismatch_max"] <= 1e-4
        assert row["actor/skipped_updates"] == row["actor/non_finite"] == 0


def test_the_turn_limit_grows_with_the_steps(ran: Ran) -> None:
    first, second = ran.steps("turn_stages")
    assert (first["attempt/turn_limit"], first["attempt/turns"]) == (1, 1)
    assert second["attempt/turn_limit"] > 1 and 1 < second["attempt/turns"] <= 2
    assert "attempt/turn_limit" not in ran.steps("grpo")[0]


def test_the_error_without_a_signal_names_the_tasks(ran: Ran) -> None:
    ended = ran.ended["no_signal"]
    assert ended.code == 1
    assert "error: step 0: no reward differed inside any group in 2 batches, the last of flat/train/" in ended.error
    assert "Traceback" not in ended.error and "algo.on_no_signal=skip" in ended.error
    assert ended.error.count("flat/train/") == 4


def test_steps_without_a_signal_are_counted(ran: Ran) -> None:
    for row in ran.steps("all_resampled"):
        assert (row["steps/without_signal"], row["steps/resampled"]) == (1, 2)
        assert (row["groups/flat_share"], row["reward/attempt"]) == (1, 0)
    played = ran.steps("all_resampled")[0]
    assert played["tokens/generated_total"] > 2 * played["tokens/generated"]


def test_a_grading_that_raises_drops_its_episodes_only(ran: Ran) -> None:
    for row in ran.steps("some_gradings_raise"):
        assert 0 < row["episodes/dropped"] < 16 and row["episodes/dropped"] % 4 == 0
        assert row["episodes/played"] + row["episodes/dropped"] == 16
    said = ran.ended["some_gradings_raise"].said
    assert "episodes lost, raises_often/train/" in said
    assert "outcome raised ZeroDivisionError: the grader divided by zero" in said
    before = read_rows(ran.folder / "some_gradings_raise" / "metrics.jsonl")[0]
    assert before["heldout/attempts/raises_often"] == 4


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("some_rewards_are_nan", "infrastructure/bad_answers", "is nan: it must be a finite number in [0, 1]"),
        ("some_gradings_block", "episodes/late", "outcome took longer than rollout.environment_timeout_s = 0.2 s"),
    ],
)
def test_episodes_of_faulty_gradings_are_dropped_and_counted(ran: Ran, name: str, count: str, said: str) -> None:
    for row in ran.steps(name):
        assert 0 < row["episodes/dropped"] == row[count] < 16
        assert row["episodes/played"] + row["episodes/dropped"] == 16
    assert said in ran.ended[name].said


@pytest.mark.parametrize(
    ("name", "error", "cause"),
    [
        ("all_gradings_raise", "step 0: all 16 episodes were lost; raises/train/", "the grader divided by zero"),
        ("unsynced", "InvariantError: engine and trainer differ by", "weights were not synced completely"),
    ],
)
def test_a_run_without_episodes_or_with_other_weights_ends(ran: Ran, name: str, error: str, cause: str) -> None:
    ended = ran.ended[name]
    assert ended.code == 1 and error in ended.error and cause in ended.error


def test_rollout_only_plays_episodes_without_training(ran: Ran) -> None:
    steps = ran.steps("rollout_only")
    assert all(row["weights/version"] == 1 and "actor/loss" not in row for row in steps)
    assert steps[0]["tokens/generated"] == ran.steps("paper")[0]["tokens/generated"]


def test_training_from_a_dump_repeats_the_update_of_the_dumped_run(ran: Ran) -> None:
    first, dumped = (
        {k: v for k, v in ran.steps(name)[0].items() if k.startswith(("actor/", "reward/", "samples/"))}
        for name in ("from_dump", "paper")
    )
    assert first == dumped


def test_fake_data_trains(ran: Ran) -> None:
    for row in ran.steps("fake_data"):
        assert row["episodes/played"] == 16
        assert math.isfinite(row["actor/loss"]) and row["actor/grad_norm"] > 0


def test_on_resume_memory_is_released_before_the_engine_gets_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def restore() -> SimpleNamespace:
        order.append("load")
        return SimpleNamespace(step=3, generated_tokens=5, weight_version=4)

    saver = SimpleNamespace(run_dir=tmp_path, folder=tmp_path, restore=restore, completed=lambda progress, beside: None)
    monkeypatch.setattr(state_module, "run_on_all_ranks", lambda grid, work: work())
    sync: SimpleNamespace = SimpleNamespace(version=0, push=lambda: order.append(f"push after {sync.version}"))
    parts = SimpleNamespace(
        actor=SimpleNamespace(
            offload=SimpleNamespace(release=lambda: order.append("release")), optimizer=SimpleNamespace(steps=3)
        ),
        sync=sync,
        grid=SimpleNamespace(rank=1, world=2),
        source=SimpleNamespace(restore=lambda path, known: 0, unfinished=lambda: list),
        sampler=SimpleNamespace(curriculum=None, known=()),
        settings=Settings(steps=3),
    )
    state = state_module.RunState(parts, saver, StopRequest.__new__(StopRequest), order.append)  # type: ignore[arg-type]
    monkeypatch.setattr(state, "conclude", lambda: order.append("conclude"))
    quiet = Progress(console=Console(file=io.StringIO()))
    recorder = SimpleNamespace(progress=quiet)
    assert loop.run(parts, state, recorder, Evaluator()) == 0  # type: ignore[arg-type]
    assert order == ["load", "release", "push after 3", "conclude"]
    assert (state.step, state.generated) == (3, 5)


LOGGED = {
    "reward by role": ("reward/attempt", "reward/revision", "reward/critique"),
    "reward by round": ("reward/round_0", "reward/round_1"),
    "success": ("success/critique_free", "success/with_critique", "heldout/critique_free"),
    "critique": ("critique/tokens", "revision/gain"),
    "clip fraction": ("actor/clip_low", "actor/clip_high"),
    "calibration weight": CALIBRATION,
    "policy": ("actor/entropy", "actor/kl_old", "actor/kl_reference", "actor/grad_norm"),
    "mismatch": ("actor/mismatch_abs", "actor/mismatch_max", "actor/mismatch_ratio"),
    "speed": ("time/generated_tokens_per_s", "time/trained_tokens_per_s"),
    "time by phase": tuple(f"time/{phase}_s" for phase in ("rollout", "pack", "score", "train", "sync", "evaluation")),
}


def test_tensorboard_has_the_values_of_metrics_jsonl(finished_run: Path) -> None:
    board = EventAccumulator(str(finished_run / "tensorboard"))
    board.Reload()
    names = set(board.Tags()["scalars"])
    for what, expected in LOGGED.items():
        assert names.issuperset(expected), f"{what}: {set(expected) - names} missing"
    written = [row for row in read_rows(finished_run / "metrics.jsonl") if "reward/attempt" in row]
    for name in ("reward/attempt", "actor/entropy", "time/rollout_s"):
        points = {event.step: event.value for event in board.Scalars(name)}
        assert points == pytest.approx({int(row["step"]): row[name] for row in written})


def test_show_prints_attempt_critique_and_revision(finished_run: Path) -> None:
    code, out, err = icrl("show", str(finished_run), "--step", "1")
    assert code == 0, err
    for part in ("problem", "round 0: attempt", "critique, ", "round 1: revision", "reward ", "advantage "):
        assert part in out
