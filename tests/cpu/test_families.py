"""Every model family from its folder to log-probs, and a run with the second family."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from actors import make_actor, plan
from model_folders import edit_config, make_folder, with_fields
from transformers import AutoModelForCausalLM, Qwen2Config
from whole_runs import SMALL, icrl, rows

from icrl_megatron.distributed.grid import Grid
from icrl_megatron.engines.registry import engine_kind
from icrl_megatron.model.config import DEFAULTS
from icrl_megatron.model.families import FAMILIES
from icrl_megatron.model.flops import counts
from icrl_megatron.model.shape import ModelShape, check_folder
from icrl_megatron.plan.layout import Layout, engine_parameters
from icrl_megatron.plan.models import PUBLISHED
from icrl_megatron.run.checks import validate_shape
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import EngineSettings
from icrl_megatron.utils.errors import ConfigError


def test_a_familys_name_is_its_model_type_in_config_json() -> None:
    assert all(family.model_type == name for name, family in FAMILIES.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_tensor_names_and_shapes_are_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, tied=tied, family=family)
    shape = check_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert shape.family.model_type == family and type(model).__name__ == shape.family.architecture
    assert shape.tensors() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert counts(shape).total == sum(p.numel() for p in model.parameters())


def test_without_head_dim_a_qwen2_head_is_hidden_size_over_heads(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, family="qwen2")
    edit_config(folder, lambda config: config.pop("head_dim"))
    assert ModelShape.read(folder).head_dim == 8
    with_fields(folder, {"hidden_size": 33})
    with pytest.raises(ConfigError, match="hidden_size=33 is not a multiple of num_attention_heads=4"):
        ModelShape.read(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention_bias": False}, "attention_bias=false: Qwen2 has biases on q, k and v"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config="),
        ({"architectures": ["Qwen2Model"]}, "use one for Qwen2ForCausalLM"),
    ],
)
def test_unsupported_configurations_are_refused(fields: dict[str, object], said: str, tmp_path: Path) -> None:
    with_fields(make_folder(tmp_path, family="qwen2"), fields)
    with pytest.raises(ConfigError, match=said):
        ModelShape.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen2.5-32B-Instruct", 32_763_876_352),
    ],
)
def test_parameters_are_counted_as_in_the_published_safetensors(name: str, parameters: int) -> None:
    assert counts(PUBLISHED[name]).total == parameters


QWEN25_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "transformers_version": "4.43.1", "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
DISTILLED: dict[str, Any] = {  # as saved by transformers 4.56
    "dtype": "bfloat16", "layer_types": ["full_attention"] * 28, "sliding_window": None, "pad_token_id": 151643,
    "rope_scaling": None, "use_mrope": False,
}  # fmt: skip
QWEN25_500M: dict[str, Any] = {
    "hidden_size": 896, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True, "max_window_layers": 21,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "name"),
    [({}, "Qwen2.5-7B-Instruct"), (DISTILLED, "Qwen2.5-7B-Instruct"), (QWEN25_500M, "Qwen2.5-0.5B-Instruct")],
)
def test_published_configurations_are_read(fields: dict[str, Any], name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**QWEN25_7B, **fields}))
    assert ModelShape.read(tmp_path) == PUBLISHED[name]


def test_absent_fields_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    kept = {n: v for n, v in QWEN25_7B.items() if n not in {*DEFAULTS, "rope_theta"}}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    shape, config = ModelShape.read(tmp_path), Qwen2Config()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert (shape.max_positions, shape.norm_eps, shape.tied) == tuple(DEFAULTS.values())
    assert shape.rope_base == config.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Qwen2.5-0.5B-Instruct", {1, 2}),  # 14 heads in 2 groups
        ("Qwen2.5-1.5B-Instruct", {1, 2, 4}),  # 12 heads; 3 and 6 GPUs cannot share 2 key-value heads evenly
        ("Qwen2.5-3B-Instruct", {1, 2, 4, 8}),
        ("Qwen2.5-7B-Instruct", {1, 2, 4}),  # 28 heads
        ("Qwen3-8B", {1, 2, 4, 8}),
    ],
)
def test_tensor_parallel_sizes_that_sglang_cannot_use_are_refused(name: str, sizes: set[int]) -> None:
    shape, accepted = PUBLISHED[name], set()
    assert {n for n in range(1, 9) if Layout(8, engine_tensor=n).refusal(shape, 8) is None} == sizes
    for size in range(1, 9):
        try:
            engine_kind("sglang").check_shape(EngineSettings(kind="sglang", tensor_parallel=size), shape)
            accepted.add(size)
        except ConfigError as error:
            said = f"engine.tensor_parallel={size}: SGLang cannot split the model's {shape.heads} attention"
            assert said in str(error)
    assert accepted >= sizes and accepted & {1, 2, 4, 8} == sizes
    engine_kind("sglang").check_shape(EngineSettings(kind="sglang", tensor_parallel=5, urls=["http://a:1"]), shape)


def test_a_run_with_such_a_size_is_refused_before_it_starts() -> None:
    words = ["actor.tensor_parallel=1", "engine.kind=sglang", "engine.tensor_parallel=2", "model.init.family=qwen2"]
    settings = load("quickstart", [*words, "model.init.heads=3", "model.init.kv_heads=1"])
    assert settings.model.init is not None
    with pytest.raises(ConfigError, match=r"engine.tensor_parallel=2: .* 3 attention heads, .*; 1 would do"):
        validate_shape(settings, ModelShape.of_tiny(settings.model.init))


def test_each_gpu_of_an_engine_has_at_least_one_key_value_head() -> None:
    shape = PUBLISHED["Qwen2.5-3B-Instruct"]
    one_head = shape.layers * 2 * 128 * (shape.hidden + 1)
    assert engine_parameters(shape, 2) == counts(shape).total // 2
    assert engine_parameters(shape, 4) == (counts(shape).total - 2 * one_head) // 4 + one_head


@pytest.mark.dist
def test_a_run_trains_qwen2(tmp_path: Path) -> None:
    """With a warm start, the local engine, tensor parallel 2, and an export that transformers loads."""
    run = tmp_path / "run"
    small = [word for word in SMALL if not word.startswith("model.")]
    words = ["train", "rulebook_easy", f"run_dir={run}", "steps=2", "launch.ranks=2", "actor.tensor_parallel=2"]
    code, _, err = icrl(*words, *small, "model.init.family=qwen2", "warm_start.steps=6", "algo.on_no_signal=train")
    assert code == 0, err
    steps = [row for row in rows(run) if "actor/mismatch_abs" in row]
    assert len(steps) == 2 and all(row["actor/mismatch_abs"] < 1e-5 for row in steps)
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.model_type == "qwen2"
    assert any(bool(p.any()) for n, p in model.named_parameters() if n.endswith("q_proj.bias"))
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_the_documented_family_agrees_with_transformers(
    tmp_path: Path, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "EXTENDING.md").read_text()
    section = page.partition("## A model family")[2].partition("\n## ")[0]
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0], names)
    monkeypatch.setitem(FAMILIES, "llama", names["FAMILY"])
    folder = make_folder(tmp_path, tied=False, family="llama")
    actor = make_actor(folder, grid)
    of_step = plan(actor)
    model, worst = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0
    for batch, frozen in zip(of_step.updates[0], actor.score(of_step)[0], strict=True):
        assert frozen.old_L is not None
        for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            ids = torch.from_numpy(batch.tokens_T[begin:end])[None]
            scores_T = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            mine_L = (batch.loss_index_L >= begin) & (batch.loss_index_L < end)
            expected_L = scores_T[batch.loss_index_L[mine_L] - begin]
            worst = max(worst, float((expected_L - frozen.old_L[mine_L]).detach().abs().max()))
    assert 0 < worst < 1e-5


def test_a_shape_of_another_family_is_not_equal() -> None:
    shape = PUBLISHED["Qwen3-8B"]
    assert dataclasses.replace(shape, model_type="qwen2") != shape and not shape.family.qkv_bias
