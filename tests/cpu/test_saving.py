"""A run that fails saves its last completed step, and the same command resumes from there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import small_disk
from whole_runs import Batch, batch, from_model, rows, train

from icrl_megatron.actor import manifest
from icrl_megatron.run.state import NEWEST_ROWS
from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.telemetry.writer import MetricsRow
from icrl_megatron.utils.step_names import step_name, step_of

SMALL = ("steps=3", "eval.problems=2", "rollout.tasks_per_step=2", "checkpoint.keep=9", "launch.device=cpu")
NEVER, ALWAYS = "checkpoint.interval=1000", "checkpoint.interval=1"
EVALUATED, NOT_EVALUATED = "eval.interval=1", "eval.interval=0"
OVERSAMPLED = ("rollout.oversample=2", "rollout.concurrency=3")
PARTIAL = ("rollout.partial=true", *OVERSAMPLED, "algo.mismatch_correction.enabled=true")
STRICT = (NOT_EVALUATED, "algo.on_no_signal=error", "algo.max_resamples=2")

FAULTS = {
    "engine@2": "EngineError: the engine failed",
    "interrupt@2": "",
    "lost@2": "error: step 2: all 8 episodes were lost",
    "nan@2": "error: step 2: all 8 episodes were lost",
    "score@2": "MemoryError: no memory is left",
}
"""Fault in the third of three steps, before its update -> text that the run's error must contain."""


class Ran(Batch):
    def checkpoints(self, name: str) -> list[str]:
        return sorted(p.name for p in (self.folder / name / "checkpoints").glob("*"))

    def saved(self, name: str, step: int) -> tuple[manifest.SavedProgress, dict[str, manifest.FileRecord]]:
        """Progress and file checksums of a checkpoint, without the id of its run."""
        found = manifest.read(self.folder / name / "checkpoints" / step_name(step))
        # The rows of the step contain wall-clock times.
        return found.progress, {name: of for name, of in found.files.items() if name != NEWEST_ROWS}

    def rows(self, name: str) -> list[MetricsRow]:
        return rows(self.folder / name)


def at(name: str) -> str:
    return name.replace("@", "_at_")


@pytest.fixture(scope="module")
def start(finished_run: Path) -> list[str]:
    return [*from_model(finished_run), *SMALL]


@pytest.fixture(scope="module")
def ran(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("saving")

    def of(name: str, *more: str) -> list[str]:
        return train(folder / at(name), *start, *more)

    commands = {
        "dump@1": ["fault=dump@1", *of("dump@1", ALWAYS, NOT_EVALUATED)],
        "whole": of("whole", ALWAYS, NOT_EVALUATED),
        "evaluated": of("evaluated", ALWAYS, EVALUATED),
        "partial": of("partial", ALWAYS, NOT_EVALUATED, *PARTIAL),
        # The fault at step 9 never happens, but it makes rewards differ, unlike those of this model.
        "strict": ["fault=flat@9", *of("strict", ALWAYS, *STRICT)],
        "flat@2": ["fault=flat@2", *of("flat@2", NEVER, *STRICT)],
        "flat@2 again": ["fault=flat@9", *of("flat@2", NEVER, *STRICT)],
    }
    for name, more in {
        **{name: [NOT_EVALUATED] for name in FAULTS},
        "heldout@2": [EVALUATED],
        "partial engine@2": [NOT_EVALUATED, *PARTIAL],
        "update@2": [NOT_EVALUATED],
        "engine@0": [NOT_EVALUATED],
    }.items():
        commands[name] = [f"fault={name.split()[-1]}", *of(name, NEVER, *more)]
        commands[f"{name} again"] = of(name, NEVER, *more)
    return Ran(folder, batch(folder, commands))


@pytest.mark.parametrize("name", FAULTS)
def test_error_before_the_update_saves_the_last_completed_step(ran: Ran, name: str) -> None:
    """The checkpoint equals one of a run that saves every step; the resumed run ends like an uninterrupted one."""
    ended = ran.ended[name]
    assert ended.code != 0
    assert FAULTS[name] in ended.error
    assert "saved step 2, the last completed one" in ended.said
    assert ran.saved(at(name), 2) == ran.saved("whole", 2)
    again = ran.succeeded(f"{name} again")
    assert f"resuming from {ran.folder / at(name)}" in "".join(again.error.split("\n"))
    assert ran.rows(at(name)) == ran.rows("whole")
    assert ran.saved(at(name), 3) == ran.saved("whole", 3)


def test_batch_without_signal_is_replayed_and_counted_once(ran: Ran) -> None:
    ended = ran.ended["flat@2"]
    assert ended.code == 1
    assert "error: step 2: no reward differed inside any group in 3 batches" in ended.error
    assert "saved step 2, the last completed one" in ended.said
    assert ran.saved(at("flat@2"), 2) == ran.saved("strict", 2)
    ran.succeeded("flat@2 again")
    assert ran.rows(at("flat@2")) == ran.rows("strict")


def test_interrupted_episodes_are_saved_as_before_the_failed_step(ran: Ran) -> None:
    name = at("partial engine@2")
    assert ran.ended["partial engine@2"].code == 1
    assert ran.saved(name, 2) == ran.saved("partial", 2)
    assert "replay.jsonl" in ran.saved(name, 2)[1]
    assert ran.ended["partial engine@2 again"].code == 0
    assert ran.rows(name) == ran.rows("partial")


def test_step_with_a_failed_evaluation_is_saved_and_only_reevaluated(ran: Ran) -> None:
    name = at("heldout@2")
    assert ran.ended["heldout@2"].code == 1
    assert "saved step 2, the last completed one" in ran.ended["heldout@2"].said
    saved, expected = ran.saved(name, 2), ran.saved("evaluated", 2)
    assert saved[0] == expected[0]
    assert {k: v for k, v in saved[1].items() if k != "row.json"} == expected[1]
    assert [row["step"] for row in ran.rows("evaluated")] == [0, 1, 2, 3, 3]
    assert ran.ended["heldout@2 again"].code == 0, ran.ended["heldout@2 again"].error
    assert ran.rows(name) == ran.rows("evaluated")


def test_partially_updated_weights_are_not_saved(ran: Ran) -> None:
    name = "update@2"
    assert ran.ended[name].code == 1
    said = ran.ended[name].said
    assert "an update had begun to change the weights, so nothing was saved; there is no checkpoint yet" in said
    assert ran.ended[f"{name} again"].code == 0, ran.ended[f"{name} again"].error
    assert ran.rows(at(name)) == ran.rows("whole")
    assert ran.checkpoints(at(name)) == ["step_000003"]


def test_episodes_that_cannot_be_dumped_are_counted_and_training_goes_on(ran: Ran) -> None:
    ended, lost = ran.succeeded("dump@1"), "episodes/not_dumped"
    assert ended.said.count("episodes are not dumped") == ended.said.count("Input/output error") == 1
    rows, expected = ran.rows(at("dump@1")), ran.rows("whole")
    assert sum(row.get(lost, 0.0) for row in rows) == 8
    assert [row | {lost: 0.0} for row in rows] == [row | {lost: 0.0} for row in expected]
    assert ran.saved(at("dump@1"), 3) == ran.saved("whole", 3)
    assert Rollouts(ran.folder / at("dump@1")).steps == [1, 3]
    assert Rollouts(ran.folder / "whole").steps == [1, 2, 3]
    assert {row.get(lost, 0.0) for row in expected} == {0.0}


def test_error_in_the_first_step_saves_nothing(ran: Ran) -> None:
    assert ran.ended["engine@0"].code == 1
    assert "saved" not in ran.ended["engine@0"].error
    assert ran.ended["engine@0 again"].code == 0
    assert ran.rows(at("engine@0")) == ran.rows("whole")


def test_warm_start_saves_its_last_completed_step(finished_run: Path, tmp_path: Path) -> None:
    """`finished_run` has the same warm start without a fault."""
    folder = tmp_path / "run"
    command = train(folder, "warm_start.steps=12", "warm_start.episodes_per_step=32", "launch.device=cpu", NEVER)
    command[0] = "sft"
    ended = batch(tmp_path, {"fails": ["fault=sft@5", *command], "goes on": command})
    assert ended["fails"].code == 1
    assert "saved step 5, the last completed one" in ended["fails"].said
    assert ended["goes on"].code == 0, ended["goes on"].error
    assert f"resuming from {folder}" in "".join(ended["goes on"].error.split("\n"))
    assert rows(folder / "warm_start") == rows(finished_run / "warm_start")
    weights = "warm_start/hf/model.safetensors"
    assert (folder / weights).read_bytes() == (finished_run / weights).read_bytes()


LOST = {
    "records": "all checkpoints are damaged",
    "checkpoints": "step 3 was saved, and no checkpoint is there now",
    "all but metrics": "neither checkpoints nor a readable progress.json",
    "emptied ledger": "neither checkpoints nor a readable progress.json",
}


def lose(run: Path, what: str) -> None:
    if what == "records":
        for record in run.glob("checkpoints/*/icrl.json"):
            record.unlink()
        return
    shutil.rmtree(run / "checkpoints")
    if what == "all but metrics":
        (run / "progress.json").unlink()
    if what == "emptied ledger":
        (run / "progress.json").write_text("")
        (run / "metrics.jsonl").unlink()


def test_run_that_lost_its_checkpoints_does_not_start_over(ran: Ran, start: list[str], tmp_path: Path) -> None:
    """It is left unchanged, and resumes once the checkpoints are restored. A run without metrics resumes too."""
    commands = {}
    for what in (*LOST, "metrics", "newest"):
        shutil.copytree(ran.folder / "whole", tmp_path / what)
        commands[what] = train(tmp_path / what, *start, ALWAYS, NOT_EVALUATED, "steps=4")
        if what in LOST:
            lose(tmp_path / what, what)
    (tmp_path / "metrics" / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "newest" / "checkpoints" / "step_000003")
    files = {what: sorted(p for p in (tmp_path / what).rglob("*") if p.is_file()) for what in LOST}
    ended = batch(tmp_path, commands)
    for what, message in LOST.items():
        assert ended[what].code == 2, (what, ended[what].error)
        (line,) = [line for line in ended[what].error.splitlines() if line.startswith("error: ")]
        assert message in line and "begin a new run with another run_dir" in line, line
        left = set(files[what]) - set((tmp_path / what).rglob("*"))
        assert not left, left
    assert (ended["metrics"].code, ended["newest"].code) == (0, 0), ended
    assert ended["newest"].error.count("resuming from") == 1
    assert "step 3 was saved last and is missing" in ended["newest"].said
    assert rows(tmp_path / "metrics")[2:] == rows(tmp_path / "newest")[4:]
    assert rows(tmp_path / "metrics")[0] == rows(tmp_path / "newest")[3]  # the checkpoint contains the rows of its step
    shutil.copytree(ran.folder / "whole" / "checkpoints", tmp_path / "all but metrics" / "checkpoints")
    back = batch(tmp_path, {"back": commands["all but metrics"]})["back"]
    assert back.code == 0, back.error
    assert rows(tmp_path / "all but metrics")[-2:] == rows(tmp_path / "newest")[-2:]


def test_model_folder_is_not_needed_after_the_first_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    """The folder is deleted after the first step. Only commands that need the initial weights fail, with a message."""
    model = tmp_path / "model"
    shutil.copytree(finished_run / "warm_start" / "hf", model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (model / "LICENSE").write_text("free")
    shutil.copytree(model, tmp_path / "model_kl")
    small = ["warm_start.steps=0", *SMALL, NOT_EVALUATED, NEVER]
    own = train(tmp_path / "run", f"model.path={model}", *small, "steps=2")
    with_kl = train(tmp_path / "kl", f"model.path={tmp_path / 'model_kl'}", *small, "steps=2", "algo.kl_coef=0.1")
    commands = {
        "gone": ["fault=gone@1", *own],
        "goes on": [*own, "steps=3"],
        "export": ["export", str(tmp_path / "run" / "checkpoints"), str(tmp_path / "hf")],
        "kl": ["fault=gone@1", *with_kl],
        "kl goes on": [*with_kl, "steps=3"],
        "begins": train(tmp_path / "other", f"model.path={model}", *small),
    }
    ended = batch(tmp_path, commands)
    assert not model.exists() and not (tmp_path / "model_kl").exists()
    for name in ("gone", "goes on", "export", "kl"):
        assert ended[name].code == 0, (name, ended[name].error)
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 2, 3, 3]
    for folder in (tmp_path / "run" / "hf", tmp_path / "hf"):
        assert (folder / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
        assert (folder / "LICENSE").read_text() == "free"
        assert (folder / "generation_config.json").exists()
    assert ended["kl goes on"].code == ended["begins"].code == 2
    gone = f"error: model.path={tmp_path / 'model_kl'}: the folder is gone, and algo.kl_coef=0.1"
    assert gone in ended["kl goes on"].error
    assert f"error: model.path={model}: no such folder" in ended["begins"].error


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB; two checkpoints of 1.2 MiB fit."""
    with small_disk(tmp_path / "disk", 3 * 1024) as disk:
        yield disk


def test_a_full_disk_keeps_checkpoints_and_runs_resume(ran: Ran, start: list[str], disk: Path, tmp_path: Path) -> None:
    run = disk / "run"
    command = train(run, *start, ALWAYS, NOT_EVALUATED, "checkpoint.keep=2")
    full = batch(tmp_path, {"full": command})["full"]
    assert full.code == 2
    (line,) = full.error.strip().splitlines()
    assert line.startswith(f"error: {run / 'checkpoints'}: not enough disk space for the checkpoint of step ")
    assert "it needs" in line and "are free; free some space there" in line
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left and all(step_of(name) is not None for name in left)
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    again = batch(tmp_path, {"again": command})["again"]
    assert again.code == 0, again.error
    assert f"{left[-1]}" in again.error
    assert rows(run) == ran.rows("whole")
