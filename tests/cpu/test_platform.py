"""The platform module: FP8 only on hardware that supports it, and no side effects on torch elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from icrl_kernels import Chunking
from icrl_megatron.distributed import platform
from icrl_megatron.model import gpt
from icrl_megatron.settings.schema import ActorSettings
from icrl_megatron.utils.errors import ConfigError

if torch.cuda.is_available():
    pytest.skip("replacing CUDA functions would hide the GPU from other tests in this process", allow_module_level=True)


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    assert platform.prepare("cpu") == platform.device() == torch.device("cpu")


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Pretends that there is a GPU with this compute capability; nothing else is replaced."""
    monkeypatch.setattr(platform, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.mark.parametrize(
    ("fp8", "values"),
    [
        ("current", {"fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        ("blockwise", {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
    ],
)
def test_fp8_recipes_become_megatrons(monkeypatch: pytest.MonkeyPatch, fp8: str, values: dict[str, str]) -> None:
    """Megatron's own configuration accepts the names and values."""
    from megatron.core.enums import Fp8Recipe
    from megatron.core.transformer.transformer_config import TransformerConfig

    fake_gpu(monkeypatch, (9, 0))
    assert platform.fp8_config(ActorSettings(fp8=fp8)) == values
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, bf16=True, **values)
    assert config.fp8 == values["fp8"] and config.fp8_recipe in {recipe.value for recipe in Fp8Recipe}


@pytest.mark.parametrize("fp8", platform.FP8_RECIPES)
def test_fp8_micro_batches_have_the_required_multiple(fp8: str) -> None:
    """Megatron's alignment for the recipe also holds for each rank's share of the tokens."""
    from megatron.core.fp8_utils import get_fp8_align_size

    for tensor, sequence in ((1, False), (2, False), (4, True)):
        settings = ActorSettings(fp8=fp8, tensor_parallel=tensor, sequence_parallel=sequence)
        share = platform.token_multiple(settings) // (tensor if sequence else 1)
        assert share % get_fp8_align_size(platform.FP8_RECIPES[fp8]) == 0
        split = replace(settings, context_parallel=2)
        share = platform.token_multiple(split) // (2 * tensor if sequence else 2)
        assert share % get_fp8_align_size(platform.FP8_RECIPES[fp8]) == 0
        assert platform.token_multiple(split) % platform.sequence_multiple(split) == 0
    assert platform.token_multiple(ActorSettings(tensor_parallel=4, sequence_parallel=True)) == 4
    assert platform.token_multiple(ActorSettings(tensor_parallel=4)) == 1


@pytest.mark.parametrize(
    ("fp8", "capability", "needed"),
    [("current", (8, 0), "(8, 9)"), ("blockwise", (8, 0), "(9, 0)"), ("blockwise", (8, 9), "(9, 0)")],
)
def test_hardware_without_fp8_is_rejected(
    monkeypatch: pytest.MonkeyPatch, fp8: str, capability: tuple[int, int], needed: str
) -> None:
    fake_gpu(monkeypatch, capability)
    with pytest.raises(ConfigError) as error:
        platform.fp8_config(ActorSettings(fp8=fp8))
    assert all(part in str(error.value) for part in (f"actor.fp8={fp8}", needed, str(capability), "actor.fp8=off"))


def test_ada_supports_tensorwise_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (8, 9))
    assert platform.fp8_config(ActorSettings(fp8="current"))["fp8_recipe"] == "tensorwise"


@pytest.mark.parametrize("fp8", platform.FP8_RECIPES)
def test_fp8_on_a_cpu_is_rejected(fp8: str) -> None:
    with pytest.raises(ConfigError, match=f"actor.fp8={fp8}.*no GPU.*actor.fp8=off"):
        platform.fp8_config(ActorSettings(fp8=fp8))


def test_missing_gpu_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"launch\.device=cuda: torch sees no GPU"):
        platform.prepare("cuda")
    assert platform.device().type == "cpu" and platform.backend() == "gloo"


def test_torch_behaves_as_without_the_platform() -> None:
    """Factories use the default device, conversions work, and CUDA is still reported as missing."""
    with torch.device("meta"):
        assert torch.zeros(2).device.type == torch.tensor([1.0]).device.type == torch.empty(2).device.type == "meta"
    assert torch.zeros(2, device="cpu").device.type == "cpu"
    assert torch.ones(2).type(torch.float64).dtype == torch.float64
    assert torch.ones(2).type("torch.IntTensor").dtype == torch.int32
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_and_generates(tmp_path: Path, dtype: torch.dtype) -> None:
    config = Qwen3Config(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert all(p.device.type == "cpu" and p.dtype == dtype for p in loaded.parameters())
    saved = dict(model.named_parameters())
    assert all(torch.equal(p, saved[n]) for n, p in loaded.named_parameters())
    ids = torch.arange(5)[None]
    generated = loaded.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 8)


def test_gpu_layers_are_transformer_engines() -> None:
    script = Path(__file__).parents[1] / "te_spec.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    qwen3, qwen2 = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    expected = {"core_attention": "TEDotProductAttention"}
    expected |= dict.fromkeys(("linear_qkv", "linear_fc1"), "TELayerNormColumnParallelLinear")
    expected |= dict.fromkeys(("linear_proj", "linear_fc2"), "TERowParallelLinear")
    for parts in (qwen3, qwen2):
        assert {name: parts[name] for name in expected} == expected
    assert qwen3["q_layernorm"] == qwen3["k_layernorm"] == "TENorm"
    assert qwen2["q_layernorm"] == qwen2["k_layernorm"] == "IdentityOp"


@pytest.mark.parametrize(
    ("capability", "rank", "given", "expected"),
    [((9, 0), "3", None, "1"), ((9, 0), "3", "0", "0"), ((10, 0), "3", None, None), ((9, 0), "", None, None)],
)
def test_exact_fp8_scales_are_set_only_on_hopper_ranks(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], rank: str, given: str | None, expected: str | None
) -> None:
    name = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability if index == 3 else None)
    platform.keep_fp8_scales_exact()
    assert os.environ.get(name) == expected


FUSIONS = ("apply_rope_fusion", "bias_activation_fusion", "gradient_accumulation_fusion")


def test_fusions_are_enabled_only_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(platform.fusions(layers, True)[name] for layers in ("auto", "torch") for name in FUSIONS)
    fake_gpu(monkeypatch, (9, 0))
    assert not any(platform.fusions("torch", True).values())
    assert not any(platform.fusions("auto", False).values())  # fp32 uses torch layers
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)  # no Apex
    assert all(platform.fusions("auto", True).values())
    assert layers._grad_accum_fusion_available


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="it is installed")
def test_missing_transformer_engine_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (9, 0))
    config: Any = SimpleNamespace(bf16=True)
    with pytest.raises(ConfigError, match=r"Transformer Engine.*not installed"):
        gpt.block_spec(config, "auto")


def test_impossible_layers_and_heads_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(fp8=None, bf16=True)
    with pytest.raises(ConfigError, match=r"actor.layers=transformer_engine: Transformer Engine needs a GPU"):
        gpt.block_spec(config, "transformer_engine")  # type: ignore[arg-type]
    config.fp8 = "hybrid"
    with pytest.raises(ConfigError, match=r"actor.layers=torch has no FP8"):
        gpt.block_spec(config, "torch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"actor.head_logits=bf16: the torch head"):
        platform.head_chunking(ActorSettings(head_logits="bf16"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match=r"actor.head_backend=triton: there is no GPU here"):
        platform.head_chunking(ActorSettings(head_backend="triton"))


def test_head_is_triton_on_a_gpu_and_torch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.head_chunking(ActorSettings()) == Chunking(None, "torch", "fp32")
    fake_gpu(monkeypatch, (9, 0))
    assert platform.head_chunking(ActorSettings(head_logits="bf16")) == Chunking(None, "auto", "bf16")


@pytest.mark.parametrize("name", platform.FOR_GPUS)
def test_gpu_libraries_are_hidden_from_megatron_on_a_cpu(tmp_path: Path, name: str) -> None:
    """The image contains them even on machines without a GPU. There, importing FlashMLA raises this error, and with the
    others Megatron would choose an optimizer that cannot work."""
    (tmp_path / f"{name}.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "from icrl_megatron.launch import doctor; print(doctor._megatron().state); import icrl_megatron.actor.actor"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["ok"], done.stderr


def test_hidden_module_cannot_be_imported_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with platform.hidden("wave"), pytest.raises(ImportError):
        importlib.import_module("wave")
    wave = importlib.import_module("wave")
    with platform.hidden("wave"):
        assert importlib.import_module("wave") is wave  # it was imported before
    assert sys.modules["wave"] is wave


def test_importing_the_actor_imports_no_tracker() -> None:
    code = "import sys, icrl_megatron.actor.actor; sys.exit('wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
