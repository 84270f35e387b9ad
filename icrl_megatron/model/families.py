"""Registry of model families: the differences between dense decoders. Imports no torch.

All families share the decoder of `shape.py` (pre-norm, RMSNorm, grouped-query attention with rotary embedding, gated
SiLU MLP). A family is one file with a `Family`, and one line in `FAMILIES` below.
"""

from __future__ import annotations

from icrl_megatron.model import qwen2, qwen3
from icrl_megatron.model.family import Family

FAMILIES: dict[str, Family] = {family.model_type: family for family in (qwen3.FAMILY, qwen2.FAMILY)}
"""By `model_type` of config.json."""
