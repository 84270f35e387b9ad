"""Dense Qwen3 (transformers' modeling_qwen3.py, SGLang's models/qwen3.py)."""

from __future__ import annotations

from icrl_megatron.model.family import Family, Only

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    qk_norm=True,
    qkv_bias=False,
    head_dim=128,
    only={"attention_bias": Only((False,), "attention biases are not supported; use a folder without them")},
)
