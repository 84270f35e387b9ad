"""Checkpoints of one process: saving, resuming, and the files that are refused."""

from __future__ import annotations

import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the stand-ins for CUDA would hide the GPU from other tests of this process", allow_module_level=True)

from actors import load, same, save, step, weights
from whole_runs import batch

from icrl_megatron.actor import checkpoint, manifest
from icrl_megatron.actor.actor import Actor
from icrl_megatron.distributed import grid as grids
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.settings.schema import Settings, TinyModel
from icrl_megatron.utils.errors import ConfigError


def assert_resumes(actor: Actor, resumed: Actor, seed: int) -> None:
    """Both make the same next step."""
    for a in (actor, resumed):
        step(a, seed=seed)
    assert same(weights(actor), weights(resumed))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_newest_checkpoints_are_kept(make: Callable[..., Actor], folder: Path, tmp_path: Path) -> None:
    actor = make()
    for number in (8, 9, 10, 999_999, 1_000_000):
        step(actor, seed=number)
        save(actor, folder, tmp_path, number)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_999999", "step_1000000"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_in_saving_keeps_the_last_checkpoint(make: Callable[..., Actor], folder: Path, tmp_path: Path) -> None:
    """A killed job leaves a .part folder. It is not a checkpoint, and the next save replaces it."""
    actor = make()
    step(actor)
    good = save(actor, folder, tmp_path, 1)
    saved = weights(actor)
    part = tmp_path / "step_000002.part"
    part.mkdir()
    (part / "rank_00000_0000.safetensors").write_bytes(b"half a fi")
    (part / checkpoint.META).write_text("{}")
    assert checkpoint.complete(tmp_path) == [good]
    assert manifest.leftovers(tmp_path) == [part]
    resumed = make()
    assert load(resumed, good) == checkpoint.SavedProgress(1, 2, 1, 10)
    assert same(saved, weights(resumed))
    assert_resumes(actor, resumed, seed=1)
    save(resumed, folder, tmp_path, 2)
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_a_checkpoint_before_the_first_update_resumes(make: Callable[..., Actor], folder: Path, tmp_path: Path) -> None:
    actor, resumed = make(), make()
    saved = save(actor, folder, tmp_path, 0)
    load(resumed, saved)
    assert resumed.optimizer.steps == 0
    assert_resumes(actor, resumed, seed=0)


class AdamWithGroupSteps(torch.optim.Optimizer):
    """Adam that counts steps per parameter group, as the fused optimizers for GPUs do. There is no count before the
    first step."""

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: Any,
        eps: float,
        adam_w_mode: bool,
        capturable: bool = False,  # Megatron-Core 0.16 does not pass it
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - beta2)
                root = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], root, value=-lr / (1 - beta1 ** group["step"]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_optimizer_with_step_counts_per_group_resumes_at_its_count(
    make: Callable[..., Actor], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Transformer Engine and Apex have such optimizers, on GPUs only. A count that restarts at 1 would make an update
    ten times as large."""
    reference = make(precision)
    step(reference)
    for module in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        monkeypatch.setattr(f"{module}.Adam", AdamWithGroupSteps)
    monkeypatch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", False)
    actor, resumed = make(precision), make(precision)
    assert isinstance(actor.optimizer.distributed.optimizer, AdamWithGroupSteps)
    step(actor)
    expected, found = weights(reference), weights(actor)
    assert all(torch.allclose(found[n], expected[n], atol=1e-6) for n in expected)
    for seed in (1, 2):
        step(actor, seed)
    saved = save(actor, folder, tmp_path, 3)
    load(resumed, saved)
    assert resumed.optimizer.steps == 3
    assert_resumes(actor, resumed, seed=4)
    assert resumed.optimizer.steps == 4


def test_another_models_checkpoint_is_refused(
    make: Callable[..., Actor], folder: Path, grid: grids.Grid, tmp_path: Path
) -> None:
    saved = save(make(), folder, tmp_path, 0)
    wider = tmp_path / "wider"
    build_tiny(wider, TinyModel(hidden=32, heads=2, kv_heads=1, ffn=64, max_positions=64), ["w"], seed=1)
    settings = Settings()
    settings.actor.precision = "fp32"
    with pytest.raises(ConfigError, match=rf"(?s){saved}.*has shape \(\d+, 32\), the model's is"):
        load(Actor(settings, wider, grid), saved)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("state", ["param", "exp_avg", "exp_avg_sq"])
def test_a_state_that_is_not_finite_is_not_saved_and_no_checkpoint_is_deleted(
    make: Callable[..., Actor], folder: Path, tmp_path: Path, state: str, value: float
) -> None:
    actor = make()
    step(actor)
    good = save(actor, folder, tmp_path, 1, keep=1)
    before = {p.name: p.read_bytes() for p in good.iterdir() if p.is_file()}
    parameter = actor.rows[3].param
    actor.optimizer._shards(parameter)[state].data.view(-1)[7] = value
    with pytest.raises(checkpoint.NonFiniteError, match=r"step 2 was not saved: the .* are not all finite"):
        save(actor, folder, tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_000001"]
    assert {p.name: p.read_bytes() for p in good.iterdir() if p.is_file()} == before
    load(make(), good)


def test_only_old_checkpoints_of_a_run_are_deleted(make: Callable[..., Actor], folder: Path, tmp_path: Path) -> None:
    actor = make()
    for number, run in ((1, "other"), (2, "mine"), (3, "mine"), (4, "")):
        save(actor, folder, tmp_path, number, None, run)
    (tmp_path / "step_000002.damaged").mkdir()
    (tmp_path / "step_000000").mkdir()  # its run is unknown
    save(actor, folder, tmp_path, 5, 1, "mine")
    left = ["step_000000", "step_000001", "step_000002.damaged", "step_000004", "step_000005"]
    assert names(tmp_path) == left


def test_a_checkpoint_is_never_overwritten(make: Callable[..., Actor], folder: Path, tmp_path: Path) -> None:
    actor = make()
    saved = save(actor, folder, tmp_path, 1)
    record = (saved / checkpoint.META).read_text()
    with pytest.raises(ConfigError, match=r"step_000001: a checkpoint of this step already exists"):
        save(actor, folder, tmp_path, 1)
    assert (saved / checkpoint.META).read_text() == record
    assert names(tmp_path) == ["step_000001"]


SIDE_FILES = (
    *("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "vocab.bpe"),
    *("chat_template.jinja", "additional_chat_templates/tools.jinja", "generation_config.json", "LICENSE"),
)
NOT_SIDE_FILES = (
    *("model.safetensors.index.json", "pytorch_model.bin", "consolidated.00.pth", "modeling.py", ".gitattributes"),
    *("original/params.json", "runs/metrics.jsonl"),
)


def test_a_checkpoint_has_the_models_other_files(make: Callable[..., Actor], folder: Path, tmp_path: Path) -> None:
    like = shutil.copytree(folder, tmp_path / "model")
    for name in (*SIDE_FILES, *NOT_SIDE_FILES):
        (like / name).parent.mkdir(exist_ok=True)
        (like / name).write_bytes(b"\x00\xff" + name.encode())
    blob = tmp_path / "blob"
    blob.write_bytes(b"\x00\xfflinked.json")
    (like / "linked.json").symlink_to(blob)  # as in a download cache
    blob.chmod(0o400)
    saved = save(make(), like, tmp_path / "checkpoints", 1) / checkpoint.SIDE_FILES
    mask = os.umask(0)
    os.umask(mask)
    for name in (*SIDE_FILES, "linked.json"):
        assert (saved / name).read_bytes() == b"\x00\xff" + name.encode()
        assert not (saved / name).is_symlink()
        assert (saved / name).stat().st_mode & 0o777 == 0o666 & ~mask
    assert (saved / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert not any((saved / name).exists() for name in NOT_SIDE_FILES)


class Payload:
    """Creates a file when its pickle is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_in_a_checkpoint_is_never_loaded(make: Callable[..., Actor], folder: Path, tmp_path: Path) -> None:
    """Not under the names of an earlier format, and not where torch would look for one."""
    marker = tmp_path / "ran"
    poison = pickle.dumps(Payload(marker))
    pickle.loads(poison)
    assert marker.exists(), "the payload works"
    marker.unlink()
    earlier = tmp_path / "earlier" / "step_000001"
    earlier.mkdir(parents=True)
    (earlier / "icrl.json").write_text('{"step": 1, "weight_version": 2, "optimizer_steps": 1, "generated_tokens": 10}')
    now = save(make(), folder, tmp_path / "now", 1)
    replaced = tmp_path / "replaced" / "step_000001"
    shutil.copytree(now, replaced)
    for path in (replaced / checkpoint.META, replaced / "index.json", *replaced.glob("rank_*")):
        path.write_bytes(poison)
    for target in (earlier, now):
        for name in (".metadata", "__0_0.distcp", "model/tokenizer.pkl", "optimizer.pt", "model/pytorch_model.bin"):
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(poison)
    for target, why in ((earlier, "earlier version of this program"), (replaced, "damaged checkpoint")):
        with pytest.raises(ConfigError, match=why):
            load(make(), target)
        with pytest.raises(ConfigError):
            checkpoint.find(target.parent)
    load(make(), now)  # files that the record does not list are not opened
    commands = {str(i): ["export", str(path), str(tmp_path / "hf")] for i, path in enumerate((earlier, replaced))}
    for ended in batch(tmp_path, commands).values():
        assert ended.code == 2, ended.error
    assert not marker.exists()


@pytest.mark.parametrize(
    "named", ["../other.safetensors", "/etc/passwd", "model/config.json", "rank_00007_0000.safetensors"]
)
def test_an_index_of_others_is_refused(make: Callable[..., Actor], folder: Path, tmp_path: Path, named: str) -> None:
    saved = save(make(), folder, tmp_path, 1)
    (tmp_path / "other.safetensors").write_bytes(next(saved.glob("rank_*")).read_bytes())
    found = manifest.read(saved)
    text = (saved / "index.json").read_text().replace("rank_00000_0000.safetensors", named)
    record = manifest.write_file(saved / "index.json", text.encode())
    manifest.write(saved, replace(found, files={**found.files, "index.json": record}))
    with pytest.raises(ConfigError, match=r"which is not a file of it|cannot be read"):
        load(make(), saved)
