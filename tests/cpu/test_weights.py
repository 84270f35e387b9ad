"""The weight table without ranks: slices of every layout cover every tensor, join undoes split, bad folders fail."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from icrl_megatron.distributed import platform
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.utils.errors import ConfigError

if torch.cuda.is_available():
    pytest.skip("replacing CUDA functions would hide the GPU from other tests in this process", allow_module_level=True)
platform.prepare("cpu")

from icrl_megatron.model.weights import Slice, WeightRow, _Table, load_hf  # noqa: E402

# Found by its metadata, because the module is hidden on a CPU (distributed/platform.py).
HAS_TRANSFORMER_ENGINE = bool(list(importlib.metadata.distributions(name="transformer_engine")))


def config(family: str, tied: bool) -> PreTrainedConfig:
    return AutoConfig.for_model(
        family,
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=6, tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.fixture(
    scope="module", params=[("qwen3", True), ("qwen3", False), ("qwen2", False)], ids=["tied", "untied", "qwen2"]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(*request.param))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # also biases, which are initialized to zero
    model.save_pretrained(out)
    return out


def table(shape: ModelShape, tensor: int, pipeline: int, tensor_rank: int, stage: int) -> list[WeightRow]:
    """The rows of one rank, for parameters with the shapes that Megatron gives them."""
    h, d, per = shape.hidden, shape.head_dim, shape.layers // pipeline
    vocab = (shape.padded_vocab(tensor) // tensor, h)
    layer = {
        "input_layernorm.weight": (h,),
        "self_attention.linear_qkv.weight": ((shape.heads + 2 * shape.kv_heads) * d // tensor, h),
        "self_attention.linear_proj.weight": (h, shape.heads * d // tensor),
        "pre_mlp_layernorm.weight": (h,),
        "mlp.linear_fc1.weight": (2 * shape.ffn // tensor, h),
        "mlp.linear_fc2.weight": (h, shape.ffn // tensor),
    }
    if shape.family.qk_norm:
        layer |= {f"self_attention.{n}_layernorm.weight": (d,) for n in "qk"}
    if shape.family.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = layer["self_attention.linear_qkv.weight"][:1]
    found = {f"decoder.layers.{i}.{n}": size for i in range(per) for n, size in layer.items()}
    if stage == 0:
        found["embedding.word_embeddings.weight"] = vocab
    if stage == pipeline - 1:
        found["decoder.final_layernorm.weight"] = (h,)
        if not shape.tied or pipeline > 1:
            found["output_layer.weight"] = vocab
    rules = _Table(shape, tensor, tensor_rank, stage * per)
    return [rules.row(n, torch.nn.Parameter(torch.full(size, torch.nan))) for n, size in found.items()]


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_slices_cover_every_tensor_once(folder: Path, tensor: int, pipeline: int) -> None:
    """Loading rank by rank and writing back at the slices' offsets restores every element exactly once."""
    shape, want = ModelShape.read(folder), load_file(folder / "model.safetensors")
    back = {n: torch.full_like(t, torch.nan) for n, t in want.items()}
    seen: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    for stage in range(pipeline):
        for tensor_rank in range(tensor):
            rows = table(shape, tensor, pipeline, tensor_rank, stage)
            load_hf(rows, folder, shape)
            for row in rows:
                assert not row.param.isnan().any(), row.name
                parts = row.split(row.param.detach())
                assert torch.equal(row.join(parts), row.param)
                for part, value in zip(row.slices, parts, strict=True):
                    assert tuple(value.shape) == part.size and part.full == tuple(want[part.name].shape)
                    if row.duplicate:
                        assert torch.equal(value, want[part.name][part.index])
                        continue
                    back[part.name][part.index] = value
                    whole = torch.zeros(part.full)
                    whole[part.index] = 1.0
                    seen[part.name] = seen[part.name] + whole
    assert all(torch.equal(back[n], want[n]) for n in want)
    assert seen.keys() == want.keys()
    for name, count in seen.items():
        # Every tensor-parallel rank has all norms; everything else exists once.
        assert (count == (tensor if "norm" in name else 1)).all(), name


def test_qkv_is_interleaved_by_group(folder: Path) -> None:
    """Query heads 2g and 2g + 1, then key head g, then value head g, as Megatron's attention expects."""
    shape, source = ModelShape.read(folder), load_file(folder / "model.safetensors")
    rows = {r.name: r for r in table(shape, 2, 1, 1, 0)}
    for kind in ("weight", "bias") if shape.family.qkv_bias else ("weight",):
        row = rows[f"decoder.layers.3.self_attention.linear_qkv.{kind}"]
        load_hf([row], folder, shape)
        blocks = row.param.detach().split(shape.head_dim)
        q, k, v = (source[f"model.layers.3.self_attn.{n}_proj.{kind}"].split(shape.head_dim) for n in "qkv")
        want = [q[4], q[5], k[2], v[2], q[6], q[7], k[3], v[3]]
        assert len(blocks) == len(want) and all(torch.equal(a, b) for a, b in zip(blocks, want, strict=True))


def test_padding_rows_are_zero(folder: Path) -> None:
    """50 words over 4 ranks: 13 rows each, 11 of which are real on the last rank."""
    shape = ModelShape.read(folder)
    rows = {r.name: r for r in table(shape, 4, 1, 3, 0)}
    row = rows["embedding.word_embeddings.weight"]
    load_hf([row], folder, shape)
    assert row.slices[0] == Slice("model.embed_tokens.weight", (50, 24), (39, 0), (11, 24))
    assert not row.param[11:].any() and row.param[:11].all(dim=1).all()


def test_unknown_parameters_are_rejected(folder: Path) -> None:
    rules = _Table(ModelShape.read(folder), 1, 0, 0)
    for name in ("decoder.layers.0.mlp.router.weight", "vision.weight"):
        with pytest.raises(RuntimeError, match=name.rpartition("layers")[0] or name):
            rules.row(name, torch.nn.Parameter(torch.zeros(1)))


def rewritten(folder: Path, out: Path, tensors: dict[str, torch.Tensor]) -> Path:
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    save_file(tensors, out / "model.safetensors")
    return out


def test_missing_and_misshapen_tensors_are_rejected(folder: Path, tmp_path: Path) -> None:
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.2.mlp.up_proj.weight"
    shape = ModelShape.read(folder)
    rows = table(shape, 2, 2, 1, 1)
    without = rewritten(folder, tmp_path / "without", {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ConfigError, match=f"{without}.*{name} is missing"):
        load_hf(rows, without, shape)
    cut = rewritten(folder, tmp_path / "cut", tensors | {name: tensors[name][:-1].contiguous()})
    with pytest.raises(ConfigError, match=rf"{name} has shape \(39, 24\), config.json implies \(40, 24\)"):
        load_hf(rows, cut, shape)


def test_values_that_overflow_the_dtype_are_rejected(folder: Path, tmp_path: Path) -> None:
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.3.self_attn.k_proj.weight"
    large = {n: t.double() for n, t in tensors.items()}
    large[name][0, 0] = 1e39
    shape = ModelShape.read(folder)
    with pytest.raises(ConfigError, match=f"{name} has 1 values that are not finite in torch.float32"):
        load_hf(table(shape, 1, 1, 0, 0), rewritten(folder, tmp_path / "large", large), shape)


@pytest.mark.skipif(not HAS_TRANSFORMER_ENGINE, reason="needs Transformer Engine")
@pytest.mark.parametrize("fp8", ["off", "current", "blockwise"])
def test_transformer_engine_parameters_are_all_known(folder: Path, tmp_path: Path, fp8: str) -> None:
    """The table has all parameters of a model built by Transformer Engine, and weights survive a round trip."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # also norms, which are initialized to one
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parents[1] / "te_model.py"), str(tmp_path), fp8]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["absent"] == found["unknown"] == found["unequal"] == []
    assert found["epsilons"] == [pytest.approx(1e-6)]
    names = set(found["parameters"])
    assert names >= {
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
    }
    assert not names & {"decoder.layers.3.input_layernorm.weight", "decoder.layers.3.pre_mlp_layernorm.weight"}
    assert found["recipe"] == {"off": "", "current": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}[fp8]
    assert found["power_of_two_scales"] is not True
