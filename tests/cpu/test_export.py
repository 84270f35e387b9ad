"""Which files the real commands for export, import, evaluation and resuming replace, and which they keep."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from whole_runs import STEPS, WARM_START, Ended, batch, train

from icrl_megatron.utils import results

UMASK = 0o027
EVAL = ("--problems", "2")
Commands = tuple[Path, dict[str, Ended]]


@pytest.fixture(scope="module")
def ended(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    folder = tmp_path_factory.mktemp("exports")
    checkpoints, hf, run = str(finished_run / "checkpoints"), str(finished_run / "warm_start" / "hf"), folder / "run"
    shutil.copytree(finished_run, run)
    shutil.copytree(finished_run, folder / "kept")
    (folder / "kept" / "hf" / "notes.md").write_text("mine")
    for step in ("step_000020", "step_000040"):
        shutil.copytree(next((finished_run / "checkpoints").glob("step_*")), folder / "steps" / step)
    (folder / "models" / "other").mkdir(parents=True)
    (folder / "models" / "notes.md").write_text("mine")
    commands = {
        "export": ["export", checkpoints, str(folder / "out" / "hf")],
        "again": ["export", checkpoints, str(folder / "out" / "hf")],
        "other": ["export", checkpoints, str(folder / "models")],
        "other_on_purpose": ["export", checkpoints, str(folder / "models"), "--overwrite"],
        "import": ["import", hf, str(folder / "steps")],
        "import_again": ["import", hf, str(folder / "steps")],
        "back": ["export", str(folder / "steps" / "step_000000"), str(folder / "back")],
        "not_a_checkpoint": ["export", str(folder / "run" / "rollouts"), str(folder / "nothing")],
        "bad_model": ["import", str(folder / "run" / "rollouts"), str(folder / "nothing")],
        "goes_on": train(run, *WARM_START, f"steps={STEPS + 1}"),
        "kept": train(folder / "kept", *WARM_START, f"steps={STEPS + 1}"),
        "eval": ["eval", str(run), *EVAL],
        "eval_again": ["eval", str(run), *EVAL],
        "eval_export": ["eval", str(run / "hf"), *EVAL],
        "eval_step": ["eval", str(run / "checkpoints" / f"step_{STEPS + 1:06d}"), *EVAL],
    }
    before = os.umask(UMASK)
    try:
        return folder, batch(folder, commands)
    finally:
        os.umask(before)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_an_export_replaces_an_earlier_export(ended: Commands, finished_run: Path) -> None:
    folder, by_name = ended
    assert (by_name["export"], by_name["again"]) == (Ended(0, ""), Ended(0, "")), by_name
    assert names(folder / "out") == {"hf"}
    assert names(folder / "out" / "hf") == names(finished_run / "hf") >= {results.MARKER, "model.safetensors"}
    assert same_weights(folder / "out" / "hf", finished_run / "hf")


def test_other_files_are_replaced_only_with_overwrite(ended: Commands) -> None:
    folder, by_name = ended
    said = "it holds notes.md, other, and is not known to be an earlier Hugging Face export"
    assert by_name["other"].code == 2 and said in by_name["other"].error
    assert by_name["other_on_purpose"].code == 0, by_name
    assert names(folder / "models") == names(folder / "out" / "hf")


def test_an_import_keeps_other_steps_and_an_export_returns_its_weights(ended: Commands, finished_run: Path) -> None:
    folder, by_name = ended
    assert [by_name[name].code for name in ("import", "import_again", "back")] == [0, 0, 0], by_name
    assert names(folder / "steps") == {"step_000000", "step_000020", "step_000040"}
    assert same_weights(folder / "back", finished_run / "warm_start" / "hf")


def test_a_failed_command_leaves_no_files(ended: Commands) -> None:
    folder, by_name = ended
    assert by_name["not_a_checkpoint"].code == by_name["bad_model"].code == 2, by_name
    assert not (folder / "nothing").exists()
    assert not [path for path in folder.rglob("*") if results.is_temporary(path)]


def test_a_resumed_run_replaces_its_export_unless_files_were_added(ended: Commands, finished_run: Path) -> None:
    folder, by_name = ended
    assert by_name["goes_on"].code == 0, by_name["goes_on"].error
    assert not same_weights(folder / "run" / "hf", finished_run / "hf")
    metrics = (folder / "kept" / "metrics.jsonl").read_text()
    assert by_name["kept"].code == 2 and "kept/hf: notes.md was added after it was written" in by_name["kept"].error
    assert "move it away, or choose another run_dir" in by_name["kept"].error
    assert (folder / "kept" / "hf" / "notes.md").read_text() == "mine"
    assert metrics == (finished_run / "metrics.jsonl").read_text()  # refused before the first step


def test_evaluations_are_written_outside_of_exports_and_checkpoints(ended: Commands) -> None:
    folder, by_name = ended
    assert [by_name[name].code for name in ("eval", "eval_again", "eval_export", "eval_step")] == [0, 0, 0, 0], by_name
    assert names(folder / "run" / "eval") == {"eval.json", "eval.png", "rollouts", results.MARKER}
    assert "eval.json" in names(folder / "run" / "eval_hf") and "eval" not in names(folder / "run" / "hf")
    (of_step,) = (folder / "run" / "checkpoints").glob("eval_step_*")
    assert json.loads((of_step / "eval.json").read_text())["scores"]


def test_all_files_follow_the_umask(ended: Commands) -> None:
    folder, _ = ended
    of_the_run = (f"run/{name}" for name in ("hf", "eval", "settings.yaml", "metrics.jsonl"))
    for name in ("out", "back", "models", "steps/step_000000", *of_the_run):
        for path in ((folder / name), *(folder / name).rglob("*")):
            want = (0o777 if path.is_dir() else 0o666) & ~UMASK
            assert path.stat().st_mode & 0o777 == want, path
