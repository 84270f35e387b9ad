"""Registry of model families: the differences between dense decoders. Imports no torch.

All families share the decoder of `shape.py` (pre-norm, RMSNorm, grouped-query attention with rotary embedding, gated
SiLU MLP). A family is one file with a `Family`, named like its `model_type`, and a name in `FAMILIES` of
settings/schema.py.
"""

from __future__ import annotations

import importlib

from icrl_megatron.model.family import Family
from icrl_megatron.settings import schema

FAMILIES: dict[str, Family] = {
    name: importlib.import_module(f"icrl_megatron.model.{name}").FAMILY for name in schema.FAMILIES
}
"""By `model_type` of config.json."""
