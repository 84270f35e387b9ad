"""Builds a dense decoder as Megatron-Core's GPTModel, one pipeline stage of one tensor-parallel shard per rank."""

from __future__ import annotations

from icrl_megatron.distributed import before_megatron  # noqa: F401

# isort: split
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.distributed.platform import DTYPES
from icrl_megatron.model.rotary import softmax_scale, yarn_frequencies
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.settings.schema import ActorSettings
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.portions import Portion


class PolicyModel(GPTModel):
    """GPTModel whose last stage returns final hidden states: only the head computes logits, in chunks."""

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def head_weight_VH(self) -> Tensor:
        """This rank's vocabulary shard of the output projection (the embedding if tied). Last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(shape: ModelShape, actor: ActorSettings) -> TransformerConfig:
    """Megatron's configuration of this model with this parallel layout."""
    dtype = DTYPES[actor.precision]
    recompute: dict[str, Any] = {}
    if actor.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif actor.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=shape.family.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        softmax_scale=softmax_scale(shape),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=actor.tensor_parallel,
        pipeline_model_parallel_size=actor.pipeline_parallel,
        context_parallel_size=actor.context_parallel,
        sequence_parallel=actor.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,
        # Megatron requires a dispatcher for variable lengths even without experts.
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        # The random weights are overwritten, but only initialization marks tensor-parallel parameters, for the grad
        # norm.
        perform_initialization=True,
        batch_p2p_comm=platform.device().type != "cpu",
        batch_p2p_sync=False,
        **recompute,
        **platform.fusions(actor.layers, dtype == torch.bfloat16),
        **platform.fp8_config(actor),
    )


def build(shape: ModelShape, actor: ActorSettings, grid: Grid) -> PolicyModel:
    """This rank's part of the model on the platform's device, without loaded weights."""
    config = transformer_config(shape, actor)
    model = PolicyModel(
        config,
        block_spec(config, actor.layers),
        vocab_size=shape.padded_vocab(actor.tensor_parallel),
        max_sequence_length=shape.max_positions,
        pre_process=grid.first_stage,
        post_process=grid.last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_base,
    )
    if shape.yarn:
        plain = model.rotary_pos_emb.inv_freq
        model.rotary_pos_emb.inv_freq = yarn_frequencies(shape.yarn, shape.rope_base, shape.head_dim).to(plain.device)
    return model.to(platform.device())


def packed_params(cu_seqlens: Tensor, longest: int, portion: Portion | None = None) -> PackedSeqParams:
    """Megatron's description of a packed micro-batch; `cu_seqlens` is [S + 1] int32, `longest` in tokens.

    Under context parallelism both are those of the whole micro-batch, as Megatron's rotary embedding and Transformer
    Engine expect, and torch's layers read `portion`. Padding at the end of a sequence is part of it. Transformer Engine
    then also needs the padded lengths, which are the same.
    """
    padded = None if portion is None else cu_seqlens
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    params.icrl_portion = portion
    return params


def block_spec(config: TransformerConfig, layers: str) -> ModuleSpec | TransformerBlockSubmodules:
    """The decoder layers for `actor.layers` (`platform.transformer_engine_layers`).

    Raises ConfigError if Transformer Engine is selected but unavailable, or FP8 is enabled without it.
    """
    if not platform.transformer_engine_layers(layers, config.bf16):
        if config.fp8:
            raise ConfigError("actor.layers=torch has no FP8; use actor.layers=transformer_engine, or actor.fp8=off")
        from icrl_megatron.model.torch_layers import torch_block_spec

        return torch_block_spec(config)
    if platform.device().type == "cpu":
        raise ConfigError(f"actor.layers={layers}: Transformer Engine needs a GPU, and there is none here; use auto")
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"actor.layers={layers}: the GPU layers are Transformer Engine's, and it is not installed; "
            "pip install --no-build-isolation 'icrl-megatron[gpu]', or use actor.layers=torch (slower, no FP8)"
        )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
