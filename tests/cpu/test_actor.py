"""The actor in one process: what must stop a run, what must only be skipped, and checkpoints that outlive accidents."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from icrl_megatron.actor import platform
from icrl_megatron.config import ConfigError, Settings, TinyModel
from icrl_megatron.data.packing import pack
from icrl_megatron.tiny import build_tiny
from icrl_megatron.types import Sample, StepPlan, StepStats

if torch.cuda.is_available():
    pytest.skip("the stand-ins for CUDA would hide the GPU from other tests of this process", allow_module_level=True)
platform.prepare("cpu")

from icrl_megatron.actor import checkpoint  # noqa: E402
from icrl_megatron.actor import grid as grids  # noqa: E402
from icrl_megatron.actor.actor import Actor, InvariantError  # noqa: E402
from icrl_megatron.actor.weights import Gatherer  # noqa: E402

LEARNING_RATE = 1e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    tiny = TinyModel(hidden=32, heads=2, kv_heads=1, ffn=48, max_positions=64)
    build_tiny(out, tiny, [f"w{i}" for i in range(20)], seed=1)
    return out


@pytest.fixture(scope="module")
def grid() -> Iterator[grids.Grid]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # remembered, so that what single_process sets does not outlive the module
            patch.delenv(name)
        grids.single_process()
        yield grids.build(Settings())
        grids.shutdown()
    assert not dist.is_initialized()


@pytest.fixture
def make(folder: Path, grid: grids.Grid) -> Callable[..., Actor]:
    def made(precision: str = "fp32", **algo: float) -> Actor:
        settings = Settings()
        settings.actor.precision = precision
        settings.optim.eps = 1e-3
        settings.algo = replace(settings.algo, **algo)
        return Actor(settings, folder, grid)

    return made


def plan(actor: Actor, seed: int = 0) -> StepPlan:
    r = random.Random(seed)
    samples = []
    for i in range(6):
        prompt, response = (tuple(r.randrange(20) for _ in range(r.randrange(2, 9))) for _ in range(2))
        logprobs = tuple(-r.uniform(2.0, 5.0) for _ in response)
        mask = (True,) * len(response)
        samples.append(
            Sample(f"t#{i}", "t", "attempt", 0, prompt, prompt, response, mask, logprobs, False, 1.0, r.uniform(-1, 1))
        )
    return pack(samples, actor.settings.algo, micro_batch_tokens=40)


def step(actor: Actor, seed: int = 0) -> StepStats:
    of_step = plan(actor, seed)
    return actor.train(of_step, actor.score(of_step), LEARNING_RATE)


def weights(actor: Actor) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in Gatherer(actor.rows, actor.grid).stream()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_step_sees_ratio_one(make: Callable[..., Actor], precision: str) -> None:
    actor = make(precision)
    before = weights(actor)
    stats = step(actor)
    assert stats.skipped_updates == 0 and stats.metrics["ratio_deviation_max"] <= 1e-5
    assert stats.metrics["kl_old"] == pytest.approx(0.0, abs=1e-8) and stats.metrics["clip_low"] == 0
    assert not same(before, weights(actor))


@pytest.mark.parametrize("parameter", ["embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc2.weight"])
def test_a_weight_that_changed_after_scoring_ends_the_run(make: Callable[..., Actor], parameter: str) -> None:
    actor = make()
    of_step = plan(actor)
    scored = actor.score(of_step)
    (row,) = [r for r in actor.rows if r.name == parameter]
    row.param.data[3] += 0.5
    after_damage = weights(actor)
    with pytest.raises(InvariantError, match="a ratio of the unchanged policy is off 1 by"):
        actor.train(of_step, scored, LEARNING_RATE)
    assert same(after_damage, weights(actor)) and actor.optimizer.steps == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_and_counted(make: Callable[..., Actor], value: float) -> None:
    """Weights, moments and the step count stay; with the weight restored the next update is as if nothing had been."""
    actor, undisturbed = make(), make()
    for a in (actor, undisturbed):
        step(a)
    weight = actor.rows[-1].param.data
    intact = float(weight.flatten()[0])
    before = weights(actor)
    weight.flatten()[0] = value
    stats = step(actor, seed=1)
    assert stats.skipped_updates == 1 and actor.optimizer.steps == 1
    assert not math.isfinite(stats.grad_norm) or stats.metrics["non_finite"] > 0
    weight.flatten()[0] = intact
    assert same(before, weights(actor))
    for a in (actor, undisturbed):
        assert step(a, seed=2).skipped_updates == 0
    assert same(weights(actor), weights(undisturbed))


def test_an_update_whose_scores_are_not_finite_is_skipped(make: Callable[..., Actor]) -> None:
    """With several updates a step the plan is scored first, and a broken policy shows there."""
    actor = make(updates_per_step=2)
    step(actor)
    weight = actor.rows[-1].param.data
    weight.flatten()[0] = math.nan
    before = weights(actor)
    stats = step(actor, seed=1)
    assert stats.skipped_updates == 2 and math.isnan(stats.grad_norm) and actor.optimizer.steps == 2
    assert stats.metrics["non_finite"] == stats.loss_tokens  # of the last weight every token depends
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before.values(), weights(actor).values(), strict=True)
    )


def test_only_the_bad_update_of_a_step_is_skipped(make: Callable[..., Actor]) -> None:
    actor = make(updates_per_step=3)
    step(actor)
    of_step = plan(actor, seed=1)
    scored = actor.score(of_step)
    of_step.updates[1][0].advantages_L[:] = 3e38  # finite, but its gradient's norm is not
    stats = actor.train(of_step, scored, LEARNING_RATE)
    assert stats.skipped_updates == 1 and actor.optimizer.steps == 5
    assert all(t.isfinite().all() for t in weights(actor).values())


def test_norms_do_not_decay(make: Callable[..., Actor]) -> None:
    """At a gradient of 0 only weight decay moves a weight: matrices shrink by lr * decay, norms stay."""
    actor = make()
    step(actor)
    for state in actor.optimizer.distributed.optimizer.state.values():
        state["exp_avg"].zero_()
    before = weights(actor)
    of_step = plan(actor)
    for batch in of_step.updates[0]:
        batch.advantages_L[:] = 0.0
    actor.train(of_step, actor.score(of_step), LEARNING_RATE)
    shrunk = 1.0 - LEARNING_RATE * actor.settings.optim.weight_decay
    for name, after in weights(actor).items():
        torch.testing.assert_close(after, before[name] * (1.0 if after.ndim == 1 else shrunk))


def save(actor: Actor, folder: Path, root: Path, number: int, keep: int = 2) -> Path:
    progress = checkpoint.Progress(number, number + 1, actor.optimizer.steps, 10 * number)
    return checkpoint.save(root, actor.rows, actor.optimizer, actor.grid, progress, folder, keep)


def load(actor: Actor, folder: Path) -> checkpoint.Progress:
    return checkpoint.load(folder, actor.rows, actor.optimizer, actor.grid)


def test_only_the_newest_checkpoints_stay(make: Callable[..., Actor], folder: Path, tmp_path: Path) -> None:
    actor = make()
    for number in (8, 9, 10, 999_999, 1_000_000):
        step(actor, seed=number)
        save(actor, folder, tmp_path, number)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_999999", "step_1000000"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crash_while_saving_leaves_the_last_good_one(
    make: Callable[..., Actor], folder: Path, tmp_path: Path
) -> None:
    """What a killed job leaves is a .part folder, or one without its record: neither is a checkpoint."""
    actor = make()
    step(actor)
    good = save(actor, folder, tmp_path, 1)
    saved = weights(actor)
    part = tmp_path / "step_000002.part"
    part.mkdir()
    (part / "__0_0.distcp").write_bytes(b"half a fi")
    (part / checkpoint.META).write_text("{}")
    (tmp_path / "step_000003").mkdir()
    assert checkpoint.complete(tmp_path) == [good]
    resumed = make()
    assert load(resumed, good) == checkpoint.Progress(1, 2, 1, 10)
    assert same(saved, weights(resumed))
    for a in (actor, resumed):
        step(a, seed=1)
    assert same(weights(actor), weights(resumed))
    save(resumed, folder, tmp_path, 2)
    assert not part.exists() and [p.name for p in checkpoint.complete(tmp_path)] == ["step_000001", "step_000002"]


def test_saving_before_the_first_update(make: Callable[..., Actor], folder: Path, tmp_path: Path) -> None:
    """Moments of zero, and an optimizer that has made no step."""
    actor, resumed = make(), make()
    saved = save(actor, folder, tmp_path, 0)
    load(resumed, saved)
    assert resumed.optimizer.steps == 0
    for a in (actor, resumed):
        step(a)
    assert same(weights(actor), weights(resumed))


class CountingInGroups(torch.optim.Optimizer):
    """Adam as the GPU's fused ones keep it: one count of steps a group, none before the first."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: Any, eps: float, adam_w_mode: bool) -> None:
        assert adam_w_mode
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
def test_an_optimizer_that_counts_in_groups_resumes_at_its_count(
    make: Callable[..., Actor], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Transformer Engine's and Apex's, which need a GPU: begun at 1 again, an update would be ten times as long."""
    torchs = make(precision)
    step(torchs)
    for module in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        monkeypatch.setattr(f"{module}.Adam", CountingInGroups)
    monkeypatch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", False)
    actor, resumed = make(precision), make(precision)
    assert isinstance(actor.optimizer.distributed.optimizer, CountingInGroups)
    step(actor)
    expected, found = weights(torchs), weights(actor)
    assert all(torch.allclose(found[n], expected[n], atol=1e-6) for n in expected)
    for seed in (1, 2):
        step(actor, seed)
    saved = save(actor, folder, tmp_path, 3)
    load(resumed, saved)
    assert resumed.optimizer.steps == 3
    for a in (actor, resumed):
        step(a, seed=4)
    assert same(weights(actor), weights(resumed)) and resumed.optimizer.steps == 4


@pytest.mark.parametrize("damage", ["record", "metadata", "cut", "gone"])
def test_a_damaged_checkpoint_is_named(make: Callable[..., Actor], folder: Path, tmp_path: Path, damage: str) -> None:
    actor = make()
    step(actor)
    saved = save(actor, folder, tmp_path, 1)
    (data,) = saved.glob("*.distcp")
    if damage == "record":
        (saved / checkpoint.META).write_text('{"step": 1')
    elif damage == "metadata":
        (saved / ".metadata").write_bytes(b"\x80\x04")
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:2000])
    else:
        data.unlink()
    with pytest.raises(ConfigError, match=str(saved)):
        load(make(), saved)


def test_a_checkpoint_of_another_model_is_refused(
    make: Callable[..., Actor], folder: Path, grid: grids.Grid, tmp_path: Path
) -> None:
    saved = save(make(), folder, tmp_path, 0)
    wider = tmp_path / "wider"
    build_tiny(wider, TinyModel(hidden=32, heads=2, kv_heads=1, ffn=64, max_positions=64), ["w"], seed=1)
    settings = Settings()
    settings.actor.precision = "fp32"
    with pytest.raises(ConfigError, match=rf"(?s){saved}.*has shape \(\d+, 32\), the model's is"):
        load(Actor(settings, wider, grid), saved)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_given_up_between_steps_changes_nothing(make: Callable[..., Actor], precision: str) -> None:
    kept, offloaded = make(precision), make(precision)
    offloaded.offload.what = "all"
    gradients = [buffer.grad_data.untyped_storage() for buffer in offloaded.wrapped.buffers]
    for seed in range(3):
        offloaded.offload.restore()
        assert step(offloaded, seed) == step(kept, seed)
        offloaded.offload.release()
        offloaded.offload.release()
        assert [storage.nbytes() for storage in gradients] == [0] * len(gradients)
    offloaded.offload.restore()
    assert all(torch.equal(a, b) for a, b in zip(offloaded.model.parameters(), kept.model.parameters(), strict=True))
