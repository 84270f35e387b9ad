"""The decoder layer in plain torch: Megatron's parallel linears with a sequence-parallel RMSNorm and packed attention.

For CPUs, and for GPUs without Transformer Engine.
"""

from __future__ import annotations

from icrl_megatron.distributed import before_megatron  # noqa: F401

# isort: split
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that its weight gradient is summed over the TP group with sequence-parallel
    activations."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences (thd) with torch's scaled_dot_product_attention.

    Sequences are copied into a right-padded batch. Under a causal mask no query of a token sees padding, so no mask is
    needed, and one call serves all sequences.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query_TND: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams,
        **_: Any,
    ) -> Tensor:
        """Returns [T, N * D] for queries [T, N, D] and keys, values [T, G, D], in the order of the packed tokens."""
        slots_T, rows, width = batch_slots(packed_seq_params)

        def laid_out(x: Tensor) -> Tensor:
            padded = x.new_zeros(rows * width, *x.shape[1:]).index_copy(0, slots_T, x)
            return padded.view(rows, width, *x.shape[1:]).transpose(1, 2)

        out = torch.nn.functional.scaled_dot_product_attention(
            laid_out(query_TND),
            laid_out(key_TGD),
            laid_out(value_TGD),
            is_causal=True,
            scale=self.scale,
            enable_gqa=self.grouped,
        )
        flat = out.transpose(1, 2).reshape(rows * width, -1)
        return flat.index_select(0, slots_T)


def batch_slots(params: PackedSeqParams) -> tuple[Tensor, int, int]:
    """The position of each packed token in a [sequences, longest] batch: (slots [T] int64, sequences, longest).

    Cached on `params`, because every layer of a micro-batch needs the same.
    """
    found = getattr(params, "icrl_slots", None)
    if found is None:
        starts = params.cu_seqlens_q[:-1].long()
        lengths = params.cu_seqlens_q[1:].long() - starts
        rows, width = len(lengths), int(params.max_seqlen_q)
        offset = torch.arange(rows, device=starts.device) * width - starts
        total = int(params.cu_seqlens_q[-1])
        found = torch.arange(total, device=starts.device) + torch.repeat_interleave(offset, lengths), rows, width
        params.icrl_slots = found
    return found


def torch_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's local layers, with the modules above replacing those that need CUDA or do not support SP."""
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm)
