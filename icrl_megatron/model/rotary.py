"""YaRN for Megatron's model: the frequencies of its rotary embedding, and the scale of its attention logits.

Megatron-Core 0.16 has a YarnRotaryEmbedding, but its fused kernel for packed sequences drops the attention factor. YaRN
multiplies both queries and keys by that factor, so its square is included here in the softmax scale, which every
attention kernel applies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from icrl_megatron.model.rope import Yarn
from icrl_megatron.model.shape import ModelShape


def softmax_scale(shape: ModelShape) -> float | None:
    """Factor on attention logits; None for the default, 1 / sqrt(head_dim)."""
    return shape.yarn.attention_factor**2 / math.sqrt(shape.head_dim) if shape.yarn else None


def yarn_frequencies(yarn: Yarn, base: float, head_dim: int) -> Tensor:
    """[head_dim / 2] fp32, radians per position: a blend over the dimensions from plain frequencies to frequencies
    divided by `yarn.factor`."""
    low, high = _ramp(yarn, base, head_dim)
    periods = base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaled = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - scaled
    return 1.0 / (yarn.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _ramp(yarn: Yarn, base: float, head_dim: int) -> tuple[float, float]:
    """The dimensions at which the blend begins and ends."""

    def dimension(turns: float) -> float:
        """The dimension that makes this many turns over the pretraining context."""
        return head_dim * math.log(yarn.original_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if high == low else high
