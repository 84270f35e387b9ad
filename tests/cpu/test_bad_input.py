"""What a user gets wrong, met by the real program: exit code 2 and one message with what, where and the remedy.

Single settings are tested in test_settings.py and test_cli.py; here are the mistakes that need files, a model or a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_folders import with_fields
from safetensors.torch import load_file, save_file
from whole_runs import WARM_START, Ended, batch, icrl, train

WEIGHTS = "model.safetensors"
NORM = "model.layers.1.post_attention_layernorm.weight"


def truncate(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def take_out(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[NORM]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def bend(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, NORM: tensors[NORM][:-1].clone()}, folder / WEIGHTS, metadata={"format": "pt"})


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[NORM][0] = float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def with_bias(folder: Path) -> None:
    bias = {"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}
    save_file({**load_file(folder / WEIGHTS), **bias}, folder / WEIGHTS, metadata={"format": "pt"})


def two_thetas(folder: Path) -> None:
    with_fields(folder, {"rope_theta": 5e6})


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


@pytest.fixture(scope="module")
def ended(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Runs in one process, one after another; each has to be refused after its own mistake."""
    folder = tmp_path_factory.mktemp("bad")
    model = finished_run / "warm_start" / "hf"
    changes: dict[str, tuple[Callable[[Path], None] | None, list[str]]] = {
        "missing_tensor": (take_out, []),
        "wrong_shape": (bend, []),
        "bad_tokenizer": (without_tokenizer, []),
        "not_finite": (not_finite, []),
        "with_bias": (with_bias, []),
        "two_thetas": (two_thetas, []),
        "nan": (None, ["tasks.sources=[{name: nan}]"]),
        "above_one": (None, ["tasks.sources=[{name: above_one}]"]),
        "empty": (None, ["tasks.sources=[{name: empty}]"]),
        "small_context": (
            None,
            ["rollout.context_tokens=5", "rollout.max_turn_tokens=2", "rollout.max_critique_tokens=2"],
        ),
        "few_tasks": (None, ["tasks.limit=3"]),
    }
    commands = {}
    for name, (damage, overrides) in changes.items():
        path = model
        if damage is not None:
            path = folder / f"model_{name}"
            shutil.copytree(model, path)
            damage(path)
        commands[name] = train(folder / name, f"model.path={path}", "warm_start.steps=0", *overrides)
    return batch(folder, commands)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("missing_tensor", ["model_missing_tensor", NORM]),
        ("wrong_shape", ["model_wrong_shape", NORM]),
        ("bad_tokenizer", ["model_bad_tokenizer", "tokenizer"]),
        ("not_finite", [NORM, "nan"]),
        ("with_bias", ["model.layers.0.self_attn.o_proj.bias (64) is not part of the model"]),
        ("two_thetas", ["rope_theta=5e+06 contradict"]),
        ("nan", ["nan/heldout/", "is nan", "[0, 1]"]),
        ("above_one", ["above_one/heldout/", "is 1.5", "divide scores by their maximum"]),
        ("empty", ["empty", "has no train problems"]),
        ("small_context", ["rulebook_easy/train/0", "rollout.context_tokens is 5", "raise it"]),
        ("few_tasks", ["3 training problems", "rollout.tasks_per_step=4", "raise tasks.limit"]),
    ],
)
def test_refused_with_one_message(ended: dict[str, Ended], name: str, parts: list[str]) -> None:
    assert ended[name].code == 2, ended[name].error
    (message,) = [line for line in ended[name].error.splitlines() if line.startswith("error: ")]
    assert all(part in message for part in parts), message
    assert "Traceback" not in ended[name].error


def test_truncated_weights_are_refused_before_anything_starts(finished_run: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(finished_run / "warm_start" / "hf", model)
    truncate(model)
    code, out, err = icrl(*train(tmp_path / "run", f"model.path={model}", "warm_start.steps=0"))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {model / WEIGHTS}: damaged (")
    assert err.endswith("; copy the model's folder again\n")
    assert not (tmp_path / "run").exists()


def test_heads_of_the_model_that_is_there_decide_on_tensor_parallel(finished_run: Path, tmp_path: Path) -> None:
    model = finished_run / "warm_start" / "hf"
    heads = json.loads((model / "config.json").read_text())["num_key_value_heads"]
    grid = ["actor.tensor_parallel=4", "launch.ranks=4"]
    code, _, err = icrl(*train(tmp_path / "run", f"model.path={model}", "warm_start.steps=0", *grid))
    assert code == 2
    assert (
        err
        == f"error: actor.tensor_parallel=4 does not divide the model's key-value heads ({heads}); 1 or 2 would do\n"
    )


def test_a_run_does_not_go_on_with_other_settings(finished_run: Path) -> None:
    before = (finished_run / "settings.yaml").read_text()
    code, _, err = icrl(*train(finished_run, *WARM_START, "algo.clip_high=0.5"))
    assert (code, err.count("\n")) == (2, 1)
    assert f"{finished_run} holds a run with other settings: algo.clip_high (was 0.28, now 0.5)" in err
    assert (finished_run / "settings.yaml").read_text() == before


def test_export_refuses_a_damaged_checkpoint_and_falls_back_in_a_folder_of_them(
    finished_run: Path, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(finished_run / "checkpoints", root)
    shard = root / "step_000006" / "rank_00000_0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    commands = {
        "named": ["export", str(root / "step_000006"), str(tmp_path / "none")],
        "folder": ["export", str(root), str(tmp_path / "newest")],
        "earlier": ["export", str(root / "step_000004"), str(tmp_path / "earlier")],
    }
    ended = batch(tmp_path, commands)
    assert ended["named"].code == 2
    assert f"error: {root / 'step_000006'}: damaged checkpoint ({shard.name} has 1000 bytes" in ended["named"].error
    assert not (tmp_path / "none").exists()
    assert (ended["folder"].code, ended["earlier"].code) == (0, 0), ended
    (message,) = [line for line in ended["folder"].error.splitlines() if "damaged" in line]
    assert "using step_000004 instead" in message
    assert (tmp_path / "newest" / WEIGHTS).read_bytes() == (tmp_path / "earlier" / WEIGHTS).read_bytes()
    assert sorted(p.name for p in root.iterdir()) == ["step_000004", "step_000006"]
