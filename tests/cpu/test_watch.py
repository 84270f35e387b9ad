"""Engine mismatch and policy collapse cause warnings and can end the run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from whole_runs import Batch, batch, from_model, rows, train

from icrl_megatron.run.watch import MISMATCH, Limits, mismatch_limits
from icrl_megatron.settings import loading as S
from icrl_megatron.utils.step_names import step_name, steps_in

BF16 = ["actor.precision=bf16", "steps=5"]
HUGE = ["optim.learning_rate=30", "steps=6", "checkpoint.keep=9"]
FREE = ["engine.mismatch_limit.mean=1e9", "engine.mismatch_limit.largest=1e9"]
"""Weights of collapsed policies amplify rounding errors, so the mismatch limit would be exceeded first."""


@pytest.fixture(scope="module")
def ran(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("watch")
    start = [*from_model(finished_run), "eval.interval=0", "checkpoint.interval=1"]

    def run(name: str, *more: str) -> list[str]:
        return train(folder / name, *start, *more)

    huge = run("stop", *HUGE, *FREE, "optim.on_collapse=stop")
    commands = {
        "bf16": run("bf16", *BF16),
        "stale": ["stale", *run("stale", *BF16, "optim.learning_rate=3e-3")],
        "warm": ["warm", *run("warm", *BF16)],
        "patient": ["warm", *run("patient", *BF16, "engine.mismatch_limit.patience=9")],
        "accepted": ["warm", *run("accepted", *BF16, "engine.mismatch_limit.mean=1", *FREE[1:])],
        "strict": run("strict", *BF16, "engine.mismatch_limit.mean=1e-9", "engine.mismatch_limit.patience=1"),
        "warn": run("warn", *HUGE, *FREE),
        "stop": huge,
        "skip_begins": run("skip", *HUGE, *FREE, "steps=1"),
        "skip": run("skip", *HUGE, *FREE, "algo.on_no_signal=skip"),
        "error_begins": run("error", *HUGE, *FREE, "optim.learning_rate=1e-4", "steps=2"),
        "error_destroys": run("error", *HUGE, *FREE, "steps=3"),
        "error": run("error", *HUGE, *FREE, "algo.on_no_signal=error"),
        "normal": run("normal", "steps=6", "optim.on_collapse=stop"),
    }
    ended = batch(folder, commands)
    # As the message advises: delete the checkpoints after the newest good one, and lower the learning rate.
    advice = r"step_(\d+) is the newest checkpoint from before the collapse; delete those after it"
    found = re.search(advice, ended["error"].said)
    root = folder / "error" / "checkpoints"
    for step in steps_in(root) if found else ():
        if step > int(found[1]):
            shutil.rmtree(root / step_name(step))
    advised = [*commands["error"], "optim.learning_rate=1e-4", "steps=4", "algo.on_no_signal=train"]
    ended |= batch(folder, {"advised": advised})
    return Batch(folder, ended)


def test_default_limits_depend_on_the_precision() -> None:
    assert mismatch_limits(S.load("quickstart")) == MISMATCH["fp32"] == Limits(1e-5, 1e-3, 1)
    bf16 = ["actor.precision=bf16", "engine.mismatch_limit.largest=5"]
    assert mismatch_limits(S.load("quickstart", bf16)) == Limits(MISMATCH["bf16"].mean, 5, MISMATCH["bf16"].patience)
    fp8 = [*bf16, "engine.quantization=fp8", "engine.mismatch_limit.mean=1"]
    quantised = mismatch_limits(S.load("quickstart", fp8))
    assert (quantised.mean, quantised.largest) == (1, 5)


def test_correct_bf16_run_is_within_the_limits(ran: Batch) -> None:
    ran.succeeded("bf16")
    assert "engine and trainer" not in ran.ended["bf16"].said
    trained = ran.trained("bf16")
    assert len(trained) == 5
    assert all(0 < row["actor/mismatch_abs"] < MISMATCH["bf16"].mean for row in trained)


@pytest.mark.parametrize("fault", ["stale", "warm"])
def test_faulty_engine_causes_warnings_and_then_ends_the_run(ran: Batch, fault: str) -> None:
    said = ran.ended[fault].said
    assert ran.ended[fault].code == 1
    assert said.count("; the run stops after 3 such steps in a row") >= 2
    assert "InvariantError: engine and trainer differ" in said and "3 in a row. Probable causes" in said
    for cause in ("weights were not synced", "another temperature than rollout.temperature", "another model"):
        assert cause in said
    trained = ran.trained(fault)
    assert len(trained) in (2, 3)  # the first step of a stale engine is correct


def test_limits_and_patience_can_be_set(ran: Batch) -> None:
    assert ran.ended["patient"].code == 0 and ran.ended["patient"].said.count("the run stops after 9 such steps") == 5
    assert ran.ended["accepted"].code == 0 and "engine and trainer" not in ran.ended["accepted"].said
    assert ran.ended["strict"].code == 1 and "at step 1, 1 in a row" in ran.ended["strict"].said


def test_collapse_causes_one_warning(ran: Batch) -> None:
    ran.succeeded("warn")
    trained = ran.trained("warn")
    assert len(trained) == 6
    assert trained[0]["actor/grad_norm"] > 1e-3 > 1e-6 > trained[-1]["actor/grad_norm"]
    assert trained[-1]["attempt/entropy"] < 1e-2 < trained[0]["attempt/entropy"]
    for name in ("warn", "skip"):
        assert ran.ended[name].said.count("the policy has collapsed") == 1
        assert "optim.learning_rate=30 is the probable cause" in ran.ended[name].said


def test_collapse_ends_the_run_if_configured(ran: Batch) -> None:
    assert ran.ended["stop"].code == 1 and "Traceback" not in ran.ended["stop"].error
    found = re.search(r"error: step (\d): the policy has collapsed", ran.ended["stop"].said)
    assert found and 4 <= int(found[1]) <= 5  # one step destroys it, three confirm it, one may still have a gradient
    assert len(ran.trained("stop")) == int(found[1]) - 1


def test_error_of_a_batch_without_signal_mentions_the_collapse(ran: Batch) -> None:
    error = ran.ended["error"].said
    assert ran.ended["error"].code == 1
    assert "no reward differed" in error and "the policy has collapsed" in error
    assert "step_000002 is the newest checkpoint from before the collapse; delete those after it" in error
    assert f"start_from={ran.folder / 'error' / 'checkpoints' / 'step_000002'}" in error


def test_advice_after_a_collapse_works(ran: Batch) -> None:
    ran.succeeded("advised")
    assert "policy has collapsed" not in ran.ended["advised"].said
    entropies = [row["attempt/entropy"] for row in rows(ran.folder / "error") if "attempt/entropy" in row]
    assert len(entropies) == 4 and min(entropies) > 1e-2


def test_normal_run_has_no_warnings(ran: Batch, finished_run: Path) -> None:
    assert ran.ended["normal"].code == 0 and "collapsed" not in ran.ended["normal"].said
    for row in [*rows(ran.folder / "normal"), *rows(finished_run)]:
        assert row.get("attempt/entropy", 1.0) > 0.1
