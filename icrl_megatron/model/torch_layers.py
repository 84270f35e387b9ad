"""The decoder layer in plain torch: Megatron's parallel linears with a sequence-parallel RMSNorm and packed attention.

For CPUs, and for GPUs without Transformer Engine.
"""

from __future__ import annotations

from icrl_megatron.distributed import before_megatron  # noqa: F401

# isort: split
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from icrl_megatron.model.context import gather_whole


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that its weight gradient is summed over the TP group with sequence-parallel
    activations."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences (thd) with torch's scaled_dot_product_attention.

    Sequences are copied into a right-padded batch. Under a causal mask no query of a token sees padding, so no mask is
    needed, and one call serves all sequences. A context-parallel rank gathers the keys and values of the others; its
    queries are not at the first positions, so they have a mask.
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
        slots = batch_slots(packed_seq_params)
        if packed_seq_params.icrl_portion is not None:
            both = gather_whole(torch.cat([key_TGD, value_TGD], dim=1), packed_seq_params.icrl_portion)
            key_TGD, value_TGD = both.chunk(2, dim=1)
        out = torch.nn.functional.scaled_dot_product_attention(
            slots.query.laid_out(query_TND),
            slots.key.laid_out(key_TGD),
            slots.key.laid_out(value_TGD),
            attn_mask=slots.mask,
            is_causal=slots.mask is None,
            scale=self.scale,
            enable_gqa=self.grouped,
        )
        return slots.query.packed(out)


@dataclass(frozen=True)
class Slots:
    """Where packed tokens are in a right-padded batch of [rows, width]."""

    places_T: Tensor
    """int64: index of each token in the flattened batch."""
    rows: int
    width: int

    def laid_out(self, x: Tensor) -> Tensor:
        """[rows, N, width, D] of [T, N, D]."""
        padded = x.new_zeros(self.rows * self.width, *x.shape[1:]).index_copy(0, self.places_T, x)
        return padded.view(self.rows, self.width, *x.shape[1:]).transpose(1, 2)

    def packed(self, x: Tensor) -> Tensor:
        """Inverse of `laid_out`, [T, N * D]."""
        return x.transpose(1, 2).reshape(self.rows * self.width, -1).index_select(0, self.places_T)


@dataclass(frozen=True)
class BatchSlots:
    """The slots of a micro-batch's queries, and of its keys and values."""

    query: Slots
    key: Slots
    mask: Tensor | None
    """[rows, 1, width of queries, width of keys] bool: what a query sees. None: what is_causal means."""


def batch_slots(params: PackedSeqParams) -> BatchSlots:
    """Cached on `params`, because every layer of a micro-batch needs the same."""
    found: BatchSlots | None = getattr(params, "icrl_slots", None)
    if found is None:
        starts = params.cu_seqlens_q[:-1].long()
        lengths = params.cu_seqlens_q[1:].long() - starts
        rows, width = len(lengths), int(params.max_seqlen_q)
        offset = torch.arange(rows, device=starts.device) * width - starts
        total = int(params.cu_seqlens_q[-1])
        places_T = torch.arange(total, device=starts.device) + torch.repeat_interleave(offset, lengths)
        whole = Slots(places_T, rows, width)
        found = BatchSlots(whole, whole, None) if params.icrl_portion is None else _own_slots(whole, params)
        params.icrl_slots = found
    return found


def _own_slots(whole: Slots, params: PackedSeqParams) -> BatchSlots:
    """Queries of a context-parallel rank: its portion of each sequence, in rows of their own width."""
    portion, device = params.icrl_portion, whole.places_T.device
    own_T = whole.places_T[torch.from_numpy(portion.own).to(device)]  # every rank has the same part of a sequence
    row_T, position_T = own_T // whole.width, own_T % whole.width
    ranks = len(portion.places) // portion.longest
    starts = params.cu_seqlens_q[:-1].long() // ranks
    query = Slots(
        row_T * (whole.width // ranks) + torch.arange(len(own_T), device=device) - starts[row_T],
        whole.rows,
        whole.width // ranks,
    )
    # Slots of no token are at position 0: a query that sees nothing would have a gradient of NaN.
    position = torch.zeros(query.rows * query.width, dtype=torch.int64, device=device)
    position[query.places_T] = position_T
    seen = torch.arange(whole.width, device=device) <= position.view(query.rows, 1, query.width, 1)
    return BatchSlots(query, whole, seen)


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
