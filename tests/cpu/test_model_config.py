"""config.json: published Qwen3 files are accepted, fields that would change the model are rejected by name, and the
rotary embedding equals that of transformers for the same file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from icrl_megatron.model.config import DEFAULTS, WITHOUT_EFFECT, name_dtype
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.utils.errors import ConfigError

QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
CARD_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""The value that Qwen3's model cards recommend for 131,072 tokens."""


def read(folder: Path, *without: str, **fields: Any) -> ModelShape:
    kept = {name: value for name, value in QWEN3_06B.items() if name not in without}
    (folder / "config.json").write_text(json.dumps({**kept, **fields}))
    return ModelShape.read(folder)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "tied": True, "rope_base": 1e6}),
        (
            {"hidden_size": 5120, "num_attention_heads": 64, "num_hidden_layers": 64, "tie_word_embeddings": False},
            {"hidden": 5120, "tied": False, "yarn": None},
        ),
        ({"rope_theta": 5000000, "max_position_embeddings": 262144}, {"rope_base": 5e6, "max_positions": 262144}),
        ({"eos_token_id": 151643, "max_position_embeddings": 32768}, {"max_positions": 32768}),  # Base
        ({"vocab_size": 151669}, {"vocab": 151669}),  # Embedding
        ({"rope_scaling": CARD_YARN}, {"max_positions": 131072, "rope_base": 1e6}),
        ({"rope_scaling": {**CARD_YARN, "type": "yarn"}}, {"max_positions": 131072}),
        ({"eos_token_id": [151645, 151643], "pad_token_id": 151643, "temperature": 0.6, "top_k": 20}, {}),
        ({"unsloth_version": "2025.4", "unsloth_fixed": True, "_name_or_path": "x", "mlp_bias": False}, {}),
        ({"sliding_window": 4096, "use_mrope": False, "something_else": None}, {}),
        ({"dtype": "float16", "layer_types": ["full_attention"] * 28}, {}),
        ({"rms_norm_eps": 1e-5}, {"norm_eps": 1e-5}),
        ({"num_key_value_heads": None}, {"kv_heads": 16}),
    ],
)
def test_published_configurations_are_read(tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    shape = read(tmp_path, **fields)
    assert {name: getattr(shape, name) for name in expected} == expected


def test_missing_fields_get_the_defaults_of_transformers(tmp_path: Path) -> None:
    shape = read(tmp_path, *DEFAULTS, "head_dim", "rope_theta")
    config = Qwen3Config()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert (shape.max_positions, shape.norm_eps, shape.tied) == tuple(DEFAULTS.values())
    assert shape.head_dim == config.head_dim
    assert shape.rope_base == config.rope_parameters["rope_theta"]


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen3_moe"}, 'model_type="qwen3_moe"'),
    ({"model_type": "llama"}, 'model_type="llama"'),
    ({"model_type": "qwen2"}, 'architectures=["Qwen3ForCausalLM"]'),
    ({"model_type": ["qwen3"]}, 'model_type=["qwen3"]'),
    ({"model_type": None}, "model_type=null"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, 'architectures=["Qwen3ForSequenceClassification"]'),
    ({"architectures": ["Qwen3Model"]}, 'architectures=["Qwen3Model"]'),
    ({"attention_bias": True}, "attention_bias=true"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
    ({"hidden_act": "swish"}, 'hidden_act="swish"'),
    ({"mlp_bias": True}, "mlp_bias=true"),
    ({"is_causal": False}, "is_causal=false"),
    ({"use_qk_norm": False}, "use_qk_norm=false"),
    ({"auto_map": {"AutoModel": "modeling.X"}}, "auto_map="),
    ({"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window=true"),
    ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
    ({"layer_types": ["full_attention"] * 27}, "one kind for each of the 28 layers"),
    ({"layer_types": "full_attention"}, 'layer_types="full_attention"'),
    ({"quantization_config": {"quant_method": "fp8"}}, 'quantization_config={"quant_method": "fp8"}'),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config="),
    ({"quantization": {"bits": 4, "group_size": 64}}, "quantization="),
    ({"torch_dtype": "float8_e4m3fn"}, 'torch_dtype="float8_e4m3fn"'),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
    ({"per_layer_config": [{}]}, "per_layer_config="),
    ({"original_max_position_embeddings": 32768}, "original_max_position_embeddings=32768"),
    ({"model_max_length": 32768}, "model_max_length=32768"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"head_dim": None}, "head_dim=None"),
    ({"num_attention_heads": 0}, "num_attention_heads=0: not a positive integer"),
    ({"num_attention_heads": True}, "num_attention_heads=True"),
    ({"vocab_size": 151936.0}, "vocab_size=151936.0"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ({"pad_token_id": 151936}, "pad_token_id=151936"),
    ({"max_window_layers": None}, "max_window_layers=null"),
    ({"use_cache": 1}, "use_cache=1"),
    ({"auto_map": None}, "auto_map=null"),
    ({"eos_token_id": ["x"]}, 'eos_token_id=["x"]'),
    ({"attn_implementation": 0}, "attn_implementation=0"),
    ({"id2label": ["a"]}, 'id2label=["a"]'),
    # The rotary embedding.
    ({"rope_theta": None}, "rope_theta=None"),
    ({"rope_theta": -1}, "rope_theta=-1"),
    ({"rope_theta": "1e6"}, "rope_theta='1e6'"),
    ({"rope_theta": 10**400}, "rope_theta=1000"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta=1e+06 contradict"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_parameters.rope_theta=None"),
    (
        {"rope_scaling": CARD_YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_scaling={'rope_type': 'yarn'",
    ),
    (
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "contradict each other",
    ),
    *(
        ({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"rope_scaling.rope_type={kind!r}")
        for kind in ("linear", "dynamic", "llama3", "longrope", "su", "mrope", None)
    ),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type='linear'"),
    ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, "rope_scaling.type='linear' contradict"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
    ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor=4.0 is unknown"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters.full_attention="),
    ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {**CARD_YARN, "factor": 0.5}}, "rope_scaling.factor=0.5"),
    ({"rope_scaling": {**CARD_YARN, "factor": None}}, "rope_scaling.factor=None"),
    ({"rope_scaling": {**CARD_YARN, "original_max_position_embeddings": 32768.5}}, "original_max_position_embeddings="),
    ({"rope_scaling": {**CARD_YARN, "beta_fast": None}}, "rope_scaling.beta_fast=None"),
    ({"rope_scaling": {**CARD_YARN, "beta_slow": 0}}, "rope_scaling.beta_slow=0"),
    ({"rope_scaling": {**CARD_YARN, "beta_fast": 1, "beta_slow": 32}}, "beta_fast=1 is below beta_slow=32"),
    ({"rope_scaling": {**CARD_YARN, "truncate": None}}, "rope_scaling.truncate=None"),
    ({"rope_scaling": {**CARD_YARN, "mscale": 0.7}}, "rope_scaling.mscale=0.7"),
    ({"rope_scaling": {**CARD_YARN, "attention_factor": 0.0}}, "rope_scaling.attention_factor=0.0"),
    ({"rope_scaling": {**CARD_YARN, "attention_factor": 1.0}}, "set attn_factor=0.878248856; to keep"),
    ({"rope_scaling": {**CARD_YARN, "attn_factor": 0.8782488562869419}}, "set attention_factor=1 in rope_scaling"),
    ({"rope_scaling": {**CARD_YARN, "extrapolation_factor": 1.0}}, "rope_scaling.extrapolation_factor=1.0"),
]


@pytest.mark.parametrize(("fields", "message"), REJECTED)
def test_fields_that_change_the_model_are_rejected(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, **fields)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize("name", ["hidden_size", "num_key_value_heads", "vocab_size", "model_type"])
def test_missing_sizes_are_rejected_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        read(tmp_path, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"[]", "not a model's configuration"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 726\n", "Git LFS pointer"),
    ],
)
def test_damaged_files_are_rejected_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"{tmp_path / 'config.json'}: .*{message}"):
        ModelShape.read(tmp_path)


def test_both_remedies_for_an_attention_factor_work(tmp_path: Path) -> None:
    """DeepSeek-R1-0528-Qwen3-8B has attn_factor, which SGLang applies and transformers ignores."""
    published = {**CARD_YARN, "attn_factor": 0.8782488562869419}
    as_transformers, as_sglang = {**published, "attn_factor": 1}, {**published, "attention_factor": 1.0}
    first, second = (read(tmp_path, rope_scaling=scaling).yarn for scaling in (as_transformers, as_sglang))
    assert first is not None and first.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert second is not None and second.attention_factor == 1.0


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_transformers_accepts_the_types_of_fields_without_effect(name: str) -> None:
    examples = {int: 3, float: 0.5, bool: True, list: [1, 2], dict: {}, str: "sdpa", type(None): None}
    for kind in WITHOUT_EFFECT[name]:
        Qwen3Config(**{name: examples[kind]})


def test_dtype_is_written_under_both_names(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_06B))
    name_dtype(path, "float32")
    assert json.loads(path.read_text()) == {**QWEN3_06B, "dtype": "float32", "torch_dtype": "float32"}


ABSENT = object()
THETAS = st.sampled_from([ABSENT, ABSENT, 10000, 1e6, 500000.5, None])
SECTION = st.fixed_dictionaries(
    {
        "rope_type": st.sampled_from(["yarn", "yarn", "yarn", "default", "linear", ABSENT]),
        "type": st.sampled_from([ABSENT, ABSENT, "yarn"]),
        "rope_theta": THETAS,
        "factor": st.sampled_from([ABSENT, 4.0, 4, 1.0, 2.5]),
        "original_max_position_embeddings": st.sampled_from([ABSENT, ABSENT, 64, 40]),
        "attention_factor": st.sampled_from([ABSENT, ABSENT, 1.0, 1.138629436111989, None]),
        "attn_factor": st.sampled_from([ABSENT, ABSENT, ABSENT, 0.8782488562869419, 1.0]),
        "beta_fast": st.sampled_from([ABSENT, ABSENT, 16, 2.5]),
        "beta_slow": st.sampled_from([ABSENT, ABSENT, 2, 0.5]),
        "mscale": st.sampled_from([ABSENT, ABSENT, 0.707, 1.0]),
        "mscale_all_dim": st.sampled_from([ABSENT, ABSENT, 0.5, 1]),
        "truncate": st.sampled_from([ABSENT, ABSENT, True, False]),
    }
).map(lambda section: {key: value for key, value in section.items() if value is not ABSENT})
SECTIONS = st.one_of(st.sampled_from([ABSENT, None, {}]), SECTION, SECTION)


SIZES = {"hidden_size": 32, "head_dim": 16, "num_hidden_layers": 1, "max_position_embeddings": 256}


def assert_same_rotary_embedding(shape: ModelShape, folder: Path) -> None:
    """The embedding equals that of transformers; for YaRN bit for bit."""
    from icrl_megatron.model.rotary import yarn_frequencies

    rotary = Qwen3RotaryEmbedding(Qwen3Config.from_pretrained(folder))
    if shape.yarn is None:
        mine, factor = shape.rope_base ** -(torch.arange(0, 16, 2, dtype=torch.float) / 16), 1.0
        torch.testing.assert_close(mine, rotary.inv_freq)
    else:
        mine, factor = yarn_frequencies(shape.yarn, shape.rope_base, 16), shape.yarn.attention_factor
        assert torch.equal(mine, rotary.inv_freq)
    assert factor == pytest.approx(rotary.attention_scaling, rel=1e-6)


@given(theta=THETAS, scaling=SECTIONS, parameters=SECTIONS, both=st.sampled_from([True, False, False]))
@settings(max_examples=300)
def test_rotary_embedding_equals_transformers_or_is_rejected(
    tmp_path_factory: pytest.TempPathFactory, theta: Any, scaling: Any, parameters: Any, both: bool
) -> None:
    """For random values in both formats of config.json."""
    found = {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters if both else ABSENT}
    fields = {key: value for key, value in found.items() if value is not ABSENT}
    folder = tmp_path_factory.getbasetemp()
    try:
        shape = read(folder, "rope_theta", "rope_scaling", **SIZES, **fields)
    except ConfigError:
        event("rejected")
        return
    event("yarn" if shape.yarn else "plain")
    assert_same_rotary_embedding(shape, folder)


@given(
    factor=st.floats(1.0, 64.0),
    original=st.one_of(st.none(), st.integers(1, 300)),
    betas=st.one_of(st.none(), st.tuples(st.floats(0.1, 4.0), st.floats(4.0, 100.0))),
    scales=st.one_of(st.none(), st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0))),
    truncate=st.sampled_from([ABSENT, True, False]),
    theta=st.floats(2.0, 1e8),
    spelling=st.sampled_from(["type", "rope_type", "rope_parameters"]),
)
@settings(max_examples=150)
def test_yarn_equals_transformers(
    tmp_path_factory: pytest.TempPathFactory,
    factor: float,
    original: int | None,
    betas: tuple[float, float] | None,
    scales: tuple[float, float] | None,
    truncate: Any,
    theta: float,
    spelling: str,
) -> None:
    section: dict[str, Any] = {"factor": factor}
    if original is not None:
        section["original_max_position_embeddings"] = original
    if betas is not None:
        section["beta_slow"], section["beta_fast"] = betas
    if scales is not None:
        section["mscale"], section["mscale_all_dim"] = scales
    if truncate is not ABSENT:
        section["truncate"] = truncate
    folder, old = tmp_path_factory.getbasetemp(), {"rope_theta": theta, "rope_scaling": section}
    if spelling == "rope_parameters":
        old = {"rope_parameters": {**section, "rope_type": "yarn", "rope_theta": theta}}
    else:
        section[spelling] = "yarn"
    shape = read(folder, "rope_theta", "rope_scaling", **SIZES, **old)
    assert shape.yarn is not None and shape.max_positions == int((original or 256) * factor)
    assert_same_rotary_embedding(shape, folder)
