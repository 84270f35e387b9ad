"""Dense Qwen2 and Qwen2.5 (transformers' modeling_qwen2.py, SGLang's models/qwen2.py)."""

from __future__ import annotations

from icrl_megatron.model.family import Family, Only

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    qk_norm=False,
    qkv_bias=True,
    head_dim=None,
    only={
        # transformers does not read it: the biases always exist.
        "attention_bias": Only((True, None), "Qwen2 has biases on q, k and v; delete the field")
    },
)
