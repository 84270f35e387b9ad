"""The definition of a model family. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Only:
    """A field that may be absent or have one of these values. Any other value changes the model."""

    values: tuple[object, ...]
    why: str
    """Why other values are refused, with the remedy."""


@dataclass(frozen=True)
class Family:
    """A dense decoder of transformers, Megatron-Core and SGLang."""

    model_type: str
    """`model_type` in config.json."""
    architecture: str
    """Class name in transformers and SGLang, ending in ForCausalLM."""
    qk_norm: bool
    """Whether queries and keys of each head are normalized."""
    qkv_bias: bool
    """Whether the q, k and v projections have biases (the output projection has none)."""
    head_dim: int | None
    """Default if config.json has none; None: hidden_size / num_attention_heads."""
    only: Mapping[str, Only] = field(default_factory=dict)
    """Fields of config.json with family-specific allowed values."""
