"""Engines in plans: the memory that their commands request, and the settings that affect it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from icrl_megatron.engines.sglang_build import server_spec
from icrl_megatron.model.flops import counts
from icrl_megatron.plan import hardware, memory, planner
from icrl_megatron.plan.changes import KINDS, changes
from icrl_megatron.plan.hardware import GIB
from icrl_megatron.plan.layout import Layout, Serving
from icrl_megatron.plan.models import PUBLISHED, shape_of
from icrl_megatron.plan.planner import Plan
from icrl_megatron.plan.workload import simulate
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError
from icrl_recipes import registry

RECIPE = "qwen3_8b_alfworld_4xh100"
H100, B200 = hardware.GPUS["h100"], hardware.GPUS["b200"]
ON_SGLANG = tuple(name for name, recipe in registry().items() if recipe().engine.kind == "sglang")
TOKEN_8B = 2 * 36 * 4 * 128 * 2
"""Cache bytes per token of the 8B model at engine TP 2: keys and values, layers, heads, head size, bf16."""


def load(*overrides: str, recipe: str = RECIPE) -> Settings:
    return settings_module.load(recipe, overrides)


def plan(*overrides: str, gpu: hardware.Gpu = H100, gpus: int | None = None) -> Plan:
    return planner.plan(load(*overrides), gpus, gpu)


def requested(settings: Settings, gpu: hardware.Gpu, folder: Path) -> float:
    """Bytes of a GPU that the servers' commands request for weights and cache: --mem-fraction-static of the GPU, or
    the weights plus --max-total-tokens if that is less. A frozen critic has a second server."""
    two = settings.rollout.critic == "frozen"
    words = server_spec(settings, folder, torch.device("cuda", 0), folder / "log", two).command(port=1)
    given = dict(pairwise(words))
    made = planner.plan(settings, gpu=gpu)
    servers = 2 if settings.rollout.critic == "frozen" else 1
    fraction = float(given["--mem-fraction-static"]) * gpu.memory_bytes
    if "--max-total-tokens" in given:
        token = made.memory.engine.cache / int(given["--max-total-tokens"])
        assert token == pytest.approx(TOKEN_8B)
        fraction = min(fraction, made.memory.engine.weights / servers + int(given["--max-total-tokens"]) * token)
    return servers * fraction


@pytest.mark.parametrize("name", ON_SGLANG)
def test_planned_engine_memory_is_what_its_command_requests(name: str, tmp_path: Path) -> None:
    settings = load(recipe=name)
    held = planner.plan(settings).memory
    assert held.engine.total == pytest.approx(requested(settings, H100, tmp_path))
    # It is in addition to what the actor keeps on the GPU.
    moved = settings.actor.offload == "all"
    beside = held.state.total - (held.state.optimizer + held.state.gradients if moved else 0)
    assert held.phases["rollout"] > held.engine.total + beside


@pytest.mark.parametrize(
    "overrides",
    [["engine.memory_fraction=0.3"], ["engine.kv_tokens=100000"], ["rollout.critic=frozen", "engine.kv_tokens=50000"]],
)
def test_engine_memory_follows_its_settings(overrides: list[str], tmp_path: Path) -> None:
    held = plan(*overrides, gpu=B200).memory
    assert held.engine.total == pytest.approx(requested(load(*overrides), B200, tmp_path))


def test_engine_does_not_shrink_to_the_remaining_memory() -> None:
    made = plan("actor.offload=none")
    assert not made.fits
    assert made.memory.phases["rollout"] > 101 * GIB
    assert not plan("actor.offload=optimizer").fits
    assert plan("actor.offload=optimizer", "engine.memory_fraction=0.6").fits
    assert plan("actor.offload=all").fits


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.memory_fraction=0.1"], r"engine.memory_fraction=0.1 .*rollout.context_tokens=16384; (0\.\d+) is"),
        (["engine.memory_fraction=0.2", "rollout.critic=frozen"], r"for solver and frozen critic; (0\.\d+) is the"),
        (["model.path=models/Qwen3-32B", "rollout.critic=frozen", "engine.tensor_parallel=1"], r"nor would any other"),
        (["engine.kv_tokens=10"], r"engine.kv_tokens=10 does not hold rollout.context_tokens=16384; give at least"),
    ],
)
def test_cache_smaller_than_one_context_is_rejected(overrides: list[str], message: str) -> None:
    made = plan(*overrides)
    assert not made.fits
    with pytest.raises(ConfigError, match=message):
        planner.require_fit(made, load(*overrides))


@pytest.mark.parametrize("critic", ["self", "frozen"])
def test_suggested_memory_fraction_is_the_smallest_that_works(critic: str) -> None:
    refusal = plan("engine.memory_fraction=0.02", f"rollout.critic={critic}").memory.engine.refusal
    least = float(refusal.partition("; ")[2].split()[0])
    assert plan(f"engine.memory_fraction={least}", f"rollout.critic={critic}").fits
    assert plan(f"engine.memory_fraction={least - 0.01}", f"rollout.critic={critic}").memory.engine.refusal


def test_changes_include_memory_fraction_and_offloading() -> None:
    layout = Layout(4, tensor=2, engine_tensor=2)
    words = dict(changes(layout))
    assert words["engine.memory_fraction=0.6"].memory_fraction == 0.6
    assert words["actor.offload=all engine.memory_fraction=0.1"].memory_fraction == 0.1
    assert len(set(words.values())) == len(words)
    kinds = KINDS.replace(" and ", ", ").split(", ")
    assert all("GPUs" in one or any(f"{kind}=" in one for kind in kinds) for one in words)
    local = Layout(4, tensor=2, serving=Serving(local=True))
    assert not any("memory_fraction" in one for one, _ in changes(local))


def test_error_says_which_changes_were_tried() -> None:
    large = ("model.path=models/Qwen3-32B", "rollout.context_tokens=40960", "engine.memory_fraction=0.9")
    alone = ("launch.ranks=1", "actor.tensor_parallel=1", "actor.sequence_parallel=false", "engine.tensor_parallel=1")
    settings = load(*large, *alone, "actor.offload=none")
    made = planner.plan(settings)
    with pytest.raises(ConfigError, match=r"no one or two changes of actor.recompute.*more at once were not tried"):
        planner.require_fit(made, settings)


def test_local_engine_keeps_weights_in_host_memory() -> None:
    settings = load(recipe="qwen3_8b")
    made = planner.plan(settings).memory
    served = planner.plan(load("engine.kind=sglang", recipe="qwen3_8b")).memory
    assert made.phases["train"] == pytest.approx(served.phases["train"] - 1.05 * 0.5 * GIB)
    weights = 2 * counts(shape_of(settings)).total
    here, there = (one.phases["sync (train to rollout)"] for one in (made, served))
    assert there - here == pytest.approx(1.05 * weights)
    assert planner.plan(load("algo.kl_coef=0.1", recipe="qwen3_8b")).fits


def test_fp8_training_keeps_two_more_bytes_per_parameter() -> None:
    shape = PUBLISHED["Qwen3-8B"]
    plain, quantised = (memory.state(shape, Layout(4, tensor=2, fp8=fp8)) for fp8 in ("off", "blockwise"))
    linear = 36 * (4096 * 2 * (4096 + 1024) + 3 * 4096 * 12288) / 2
    assert quantised.total - plain.total == pytest.approx(2 * linear)
    assert quantised.stays("all") - plain.stays("all") == pytest.approx(2 * linear)
    off, on = (plan(f"actor.fp8={fp8}").memory.phases for fp8 in ("off", "current"))
    for phase in off:
        assert on[phase] - off[phase] == pytest.approx(1.05 * 2 * linear)


def test_fp8_engine_has_smaller_weights_and_more_cache() -> None:
    plain, quantised = plan(), plan("engine.quantization=fp8")
    linear = 36 * (4096 * 2 * (4096 + 1024) + 3 * 4096 * 12288) / 2
    assert plain.memory.engine.weights - quantised.memory.engine.weights == pytest.approx(linear)
    assert quantised.memory.engine.total == pytest.approx(plain.memory.engine.total)  # the cache gets it
    assert quantised.times.phases["decode"] < plain.times.phases["decode"]


def test_few_concurrent_requests_slow_decoding() -> None:
    base = plan().times.phases["decode"]
    for setting in ("engine.max_batch=8", "rollout.concurrency=8"):
        assert plan(setting).times.phases["decode"] > 2 * base
    assert plan("engine.max_batch=64").times.phases["decode"] == base  # two engines play 128 episodes
    assert plan("engine.servers=1").times.phases["decode"] > base


def test_oversampling_shortens_the_longest_episode() -> None:
    base, over = simulate(load()), simulate(load("rollout.oversample=1.5"))
    assert len(over.generated_E) == 24 * 8
    assert over.generated_E.max() < base.generated_E.max()
    assert over.generated_tokens > base.generated_tokens
    assert len(over.sequence_S) == pytest.approx(len(base.sequence_S), rel=0.1)  # still 16 tasks
    assert plan("rollout.oversample=1.5").times.phases["decode"] < plan().times.phases["decode"]
    longest_T = np.sort(simulate(load("rollout.tasks_per_step=24")).generated_E.reshape(24, 8).max(axis=1))
    assert over.generated_E.max() == longest_T[15]


def test_external_servers_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = ("engine.urls=[http://a:1,http://b:1]", "actor.offload=none")
    held = plan(*remote).memory
    assert held.engine.total == 0
    assert held.phases["rollout"] == pytest.approx(1.05 * held.state.total + 3 * GIB)
    monkeypatch.setattr(hardware, "detect", lambda: H100)
    planner.check(load(*remote))
    with pytest.raises(ConfigError, match="does not fit"):
        planner.check(load("actor.offload=none"))


def test_training_on_nodes_with_fewer_gpus_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect", lambda: H100)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    planner.check(load("launch.nodes=3"))  # of four GPUs each
