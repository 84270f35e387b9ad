"""What one model family has of its own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Only:
    """A field that may be absent or have one of these values. Any other value changes the model."""

    values: tuple[object, ...]
    why: str
    """Why other values are refused, and the remedy."""


@dataclass(frozen=True)
class Family:
    """A dense decoder as transformers, Megatron-Core and SGLang know it."""

    model_type: str
    """In config.json."""
    architecture: str
    """Class of transformers and SGLang, ending in ForCausalLM."""
    qk_norm: bool
    """Whether queries and keys of each head are normalised."""
    qkv_bias: bool
    """Whether the projections to queries, keys and values have biases (the output projection has none)."""
    head_dim: int | None
    """Default where config.json does not say; None: hidden_size / num_attention_heads."""
    only: Mapping[str, Only] = field(default_factory=dict)
    """Fields of config.json that this family reads in its own way."""
