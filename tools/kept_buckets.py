"""Weights that an SGLang server copies from a bucket which stays mapped between requests. For `time_sync.py`.

The server imports this file (`--custom-weight-loader kept_buckets.load kept_buckets.forget`), so it uses only torch and
the standard library. torch 2.13 maps a buffer shared by name only if the process has no tensor of it
(multiprocessing/reductions.py: `storage_from_cache`). So one tensor that is kept also keeps the mapping.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_KEPT: dict[int, Tensor] = {}
"""The mapped buckets, by address."""


def load(model: Any, named: Sequence[tuple[str, Tensor]]) -> None:
    """SGLang calls this with the server's model, and with one bucket [bytes, uint8] whose name is the JSON of its
    tensors: name, shape, dtype, and first and last byte of each."""
    for text, bucket in named:
        _KEPT[bucket.untyped_storage().data_ptr()] = bucket
        views = [
            (name, bucket[start:end].view(getattr(torch, dtype)).view(shape))
            for name, shape, dtype, start, end in json.loads(text)
        ]
        model.load_weights(views)


def forget(model: Any, named: Sequence[tuple[str, Tensor]]) -> None:
    """Unmaps the buckets, so that the next request maps its own again."""
    _KEPT.clear()
