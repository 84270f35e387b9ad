"""Mistakes that involve files, a model or a run: the program exits with 2 and one message that names the remedy.

Invalid values of single settings are tested in test_settings.py and test_cli.py.
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
BIAS = "model.layers.0.self_attn.o_proj.bias"


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """A function that changes the tensors of a model folder."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


DAMAGED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing_tensor": (edit(lambda t: t.pop(NORM)), ["model_missing_tensor", NORM]),
    "wrong_shape": (edit(lambda t: t.update({NORM: t[NORM][:-1].clone()})), ["model_wrong_shape", NORM]),
    "not_finite": (edit(lambda t: t[NORM][:1].fill_(torch.nan)), [NORM, "nan"]),
    "with_bias": (edit(lambda t: t.update({BIAS: torch.ones(64)})), [f"{BIAS} (64) is not part of the model"]),
    "two_thetas": (lambda folder: with_fields(folder, {"rope_theta": 5e6}), ["rope_theta=5e+06 contradict"]),
    "bad_tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ["model_bad_tokenizer", "tokenizer"]),
}
"""Name -> (the damage to a model folder, parts of the message)."""
SHORT = ["rollout.context_tokens=5", "rollout.max_turn_tokens=2", "rollout.max_critique_tokens=2"]
OVERRIDES: dict[str, tuple[list[str], list[str]]] = {
    "nan": (["tasks.sources=[{name: nan}]"], ["nan/heldout/", "is nan", "[0, 1]"]),
    "above_one": (
        ["tasks.sources=[{name: above_one}]"],
        ["above_one/heldout/", "is 1.5", "divide scores by their max"],
    ),
    "empty": (["tasks.sources=[{name: empty}]"], ["empty", "has no train problems"]),
    "small_context": (SHORT, ["rulebook_easy/train/0", "rollout.context_tokens is 5", "raise it"]),
    "few_tasks": (["tasks.limit=3"], ["3 training problems", "rollout.tasks_per_step=4", "raise tasks.limit"]),
}
"""Name -> (overrides, parts of the message)."""
PARTS = {name: parts for name, (_, parts) in [*DAMAGED.items(), *OVERRIDES.items()]}


@pytest.fixture(scope="module")
def ended(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The runs with these mistakes, one after another in one process."""
    folder = tmp_path_factory.mktemp("bad")
    model = finished_run / "warm_start" / "hf"
    commands = {}
    for name, (damage, _) in DAMAGED.items():
        copy = shutil.copytree(model, folder / f"model_{name}")
        damage(copy)
        commands[name] = train(folder / name, f"model.path={copy}", "warm_start.steps=0")
    for name, (overrides, _) in OVERRIDES.items():
        commands[name] = train(folder / name, f"model.path={model}", "warm_start.steps=0", *overrides)
    return batch(folder, commands)


@pytest.mark.parametrize("name", PARTS)
def test_a_mistake_is_refused_with_one_message(ended: dict[str, Ended], name: str) -> None:
    assert ended[name].code == 2, ended[name].error
    (message,) = [line for line in ended[name].error.splitlines() if line.startswith("error: ")]
    assert all(part in message for part in PARTS[name]), message
    assert "Traceback" not in ended[name].error


def test_truncated_weights_are_refused_before_anything_starts(finished_run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(finished_run / "warm_start" / "hf", tmp_path / "model")
    whole = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    code, out, err = icrl(*train(tmp_path / "run", f"model.path={model}", "warm_start.steps=0"))
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {model / WEIGHTS}: damaged (")
    assert err.endswith("; copy the model's folder again\n")
    assert not (tmp_path / "run").exists()


def test_tensor_parallel_must_divide_the_models_heads(finished_run: Path, tmp_path: Path) -> None:
    model = finished_run / "warm_start" / "hf"
    heads = json.loads((model / "config.json").read_text())["num_key_value_heads"]
    grid = ["actor.tensor_parallel=4", "launch.ranks=4"]
    code, _, err = icrl(*train(tmp_path / "run", f"model.path={model}", "warm_start.steps=0", *grid))
    said = f"error: actor.tensor_parallel=4 does not divide the model's key-value heads ({heads}); 1 or 2 would do\n"
    assert (code, err) == (2, said)


def test_a_run_is_not_resumed_with_other_settings(finished_run: Path) -> None:
    before = (finished_run / "settings.yaml").read_text()
    code, _, err = icrl(*train(finished_run, *WARM_START, "algo.clip_high=0.5"))
    assert (code, err.count("\n")) == (2, 1)
    assert f"{finished_run} holds a run with other settings: algo.clip_high (was 0.28, now 0.5)" in err
    assert (finished_run / "settings.yaml").read_text() == before


def test_export_refuses_a_damaged_checkpoint_and_skips_one_in_a_folder(finished_run: Path, tmp_path: Path) -> None:
    root = shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
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
