"""Trackers offline with the real packages, and trackers that fail."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from documented import defined
from whole_runs import SMALL, WARM_START, icrl, rows

from icrl_megatron.run.checks import check_installed, validate_settings
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import TRACKERS, Settings, TrackerSettings
from icrl_megatron.telemetry import trackers
from icrl_megatron.telemetry.trackers import COLUMNS, STATE_FILE, TableRow, Trackers, flat
from icrl_megatron.utils.errors import ConfigError

ROWS: list[TableRow] = [("set/1", 0, 0, "attempt", 0.0, "no" * 50), ("set/1", 0, 0, "critique", 0.0, "try yes")]


def settings(name: str) -> TrackerSettings:
    return TrackerSettings([name], project="tests", tags=["small"], offline=True, episodes=1, max_chars=10)


def tracked(name: str, folder: Path, steps: range, log: Callable[[str], None] = print) -> int:
    opened = Trackers(settings(name), "tiny", folder, flat(Settings(name="tiny", seed=7)), log)
    for step in steps:
        opened.write(step, {"actor/loss": 0.5 * step, "heldout/bad": float("nan"), "a/b": 1.0, "a/b/c": 2.0}, ROWS)
    opened.close()
    return opened.failed


def state(folder: Path) -> dict[str, dict[str, object]]:
    return dict(json.loads((folder / STATE_FILE).read_text()))


def from_mlflow(folder: Path) -> tuple[list[tuple[int, float]], list[str]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").absolute().as_uri())
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["seed"] == "7" and run.data.tags["small"] == "true" and run.info.status == "FINISHED"
    path = client.download_artifacts(run.info.run_id, "episodes/step_000001.json")
    table = json.loads(Path(path).read_text())
    history = client.get_metric_history(run.info.run_id, "actor/loss")
    return [(metric.step, metric.value) for metric in history], table["text"]


def from_trackio(folder: Path) -> tuple[list[tuple[int, float]], list[str]]:
    from trackio import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("tests")
    logs = SQLiteStorage.get_logs("tests", run)
    table = next(row["episodes"] for row in logs if row["step"] == 1 and "episodes" in row)
    assert "set/1" in json.dumps(table)
    return [(row["step"], row["actor/loss"]) for row in logs if "actor/loss" in row], ["nonononono"]


def wandb_records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or its last fragment
            yield record
            record = b""


def from_wandb(folder: Path) -> tuple[list[tuple[int, float]], list[str]]:
    from wandb.proto import wandb_internal_pb2

    found: list[tuple[int, float]] = []
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            if "actor/loss" in items:
                found.append((items["_step"], items["actor/loss"]))
    (table, *_) = sorted((folder / "wandb").glob("offline-run-*/files/media/table/episodes_1_*.json"))
    content = json.loads(table.read_text())
    assert content["columns"] == list(COLUMNS)
    return found, [row[-1] for row in content["data"]]


READ = {"wandb": from_wandb, "mlflow": from_mlflow, "trackio": from_trackio}


@pytest.mark.parametrize("name", TRACKERS)
def test_resumed_run_continues_and_repeats_no_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    if name == "trackio":  # trackio reads its folder only when it is imported
        monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    assert tracked(name, tmp_path, range(3)) == 0
    first = state(tmp_path)[name]
    time.sleep(1.1)  # wandb's folder names have a resolution of one second
    assert tracked(name, tmp_path, range(1, 5)) == 0  # resumed from step 1
    assert state(tmp_path)[name] == {"run_id": first["run_id"], "last_step": 4}
    history, texts = READ[name](tmp_path)
    deadline = time.monotonic() + 30
    while len(history) < 5 and time.monotonic() < deadline:  # wandb's service may write after the run has finished
        time.sleep(0.2)
        history, texts = READ[name](tmp_path)
    assert history == [(step, 0.5 * step) for step in range(5)]
    assert texts == ["nonononono"]  # one row, truncated to ten characters


def module(start: Callable[[object], object]) -> types.ModuleType:
    made = types.ModuleType("odd_tracker")
    made.start = start  # type: ignore[attr-defined]
    return made


def odd(monkeypatch: pytest.MonkeyPatch, start: Callable[[object], object]) -> None:
    monkeypatch.setitem(trackers.MODULES, "odd", "odd_tracker")
    monkeypatch.setitem(__import__("sys").modules, "odd_tracker", module(start))


@pytest.mark.parametrize("error", [OSError("no route to host"), SystemExit(3)])
def test_failed_tracker_is_disabled_once(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(identity: object) -> object:
        raise error

    messages: list[str] = []
    odd(monkeypatch, start)
    assert tracked("odd", tmp_path, range(5), messages.append) == 1
    assert len(messages) == 1 and messages[0].startswith("odd gets no more metrics (")


def test_hanging_tracker_delays_neither_steps_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(trackers, "QUEUE_ITEMS", 4)
    odd(monkeypatch, lambda identity: time.sleep(3600))
    messages: list[str] = []
    begun = time.monotonic()
    assert tracked("odd", tmp_path, range(50), messages.append) == 1
    assert time.monotonic() - begun < 5
    assert messages == ["odd gets no more metrics (it is 4 steps behind); metrics.jsonl has all of them"]


def test_documented_tracker_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd(monkeypatch, defined("A tracker")["start"])
    assert tracked("odd", tmp_path, range(2)) == 0
    assert "1,actor/loss,0.5\n" in (tmp_path / "tiny.csv").read_text()


def test_unknown_and_missing_trackers_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"trackers.names has comet: choose from wandb, mlflow, trackio"):
        validate_settings(load("rulebook_easy", ["trackers.names=[comet]"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'icrl-megatron[wandb]'")):
        check_installed(load("rulebook_easy", ["trackers.names=[wandb]"]))


def test_every_tracker_has_a_module() -> None:
    assert all(callable(importlib.import_module(module).start) for module in trackers.MODULES.values())


@pytest.mark.dist
def test_run_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    words = ["train", "rulebook_easy", f"run_dir={tmp_path / 'run'}", "steps=2", *SMALL, *WARM_START]
    code, _, err = icrl(*words, "trackers.names=[mlflow]", "trackers.offline=true", "trackers.project=tests")
    assert code == 0, err
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trained, warm = ("run", "rulebook_easy", "actor/grad_norm"), ("run/warm_start", "rulebook_easy-sft", "sft/nll")
    for folder, name, metric in (trained, warm):
        client = MlflowClient(tracking_uri=(tmp_path / folder / "mlruns").absolute().as_uri())
        (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
        assert run.info.run_name == name
        found = {(m.step, m.value) for m in client.get_metric_history(run.info.run_id, metric)}
        assert found == {(int(row["step"]), row[metric]) for row in rows(tmp_path / folder) if metric in row}
