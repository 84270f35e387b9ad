"""Arguments of the head, checked before anything is computed or communicated: a ValueError names what was wrong."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from icrl_kernels.objective import Streams, Terms
from icrl_kernels.vocabulary import VocabShard

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def check_products(
    hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor, temperature: float, shard: VocabShard, chunk_tokens: int
) -> None:
    """Shapes, dtypes and ranges of what both heads take.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _require(hidden_LH.dim() == 2, "hidden_LH", "two dimensions [tokens, hidden]", list(hidden_LH.shape))
    _require(hidden_LH.dtype in FLOATING, "hidden_LH", "a floating dtype", hidden_LH.dtype)
    tokens, width = hidden_LH.shape
    wanted = f"[vocabulary of this rank, {width}]"
    _require(weight_VH.dim() == 2 and weight_VH.shape[1] == width, "weight_VH", wanted, list(weight_VH.shape))
    same = weight_VH.dtype == hidden_LH.dtype
    _require(same, "weight_VH", f"the dtype of hidden_LH, {hidden_LH.dtype}", weight_VH.dtype)
    _require(targets_L.dtype == torch.int64, "targets_L", "torch.int64", targets_L.dtype)
    _require(targets_L.shape == (tokens,), "targets_L", f"shape [{tokens}], as hidden_LH", list(targets_L.shape))
    _require(0 < temperature < float("inf"), "temperature", "a finite number above 0", temperature)
    _require(chunk_tokens >= 1, "chunk_tokens", "at least 1", chunk_tokens)
    rows = weight_VH.shape[0]
    _require(0 <= shard.valid <= rows, "shard.valid", f"0 to {rows}, the rows of weight_VH", shard.valid)
    ends = shard.start + shard.valid
    within = shard.vocabulary >= 1 and (shard.valid == 0 or (shard.start >= 0 and ends <= shard.vocabulary))
    _require(within, "shard", f"columns within 0 to {shard.vocabulary}", f"{shard.start} to {ends}")
    if shard.group is None:
        _require(shard.valid == shard.vocabulary, "shard.valid", f"{shard.vocabulary} without a group", shard.valid)
    if tokens:
        low, high = int(targets_L.min()), int(targets_L.max())
        inside = low >= 0 and high < shard.vocabulary
        _require(inside, "targets_L", f"ids in 0 to {shard.vocabulary - 1}", f"ids from {low} to {high}")


def check_objective(hidden_LH: Tensor, streams: Streams, terms: Terms) -> None:
    """Shapes, dtypes and values of the streams and the scalars of the objective.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    tokens = hidden_LH.shape[0]
    for field in fields(streams):
        stream_L = getattr(streams, field.name)
        if stream_L is None:
            continue
        _require(stream_L.shape == (tokens,), field.name, f"shape [{tokens}], as hidden_LH", list(stream_L.shape))
        if field.name == "calibrated_L":
            _require(stream_L.dtype == torch.bool, field.name, "torch.bool", stream_L.dtype)
        elif field.name != "targets_L":
            _require(stream_L.dtype in FLOATING, field.name, "a floating dtype", stream_L.dtype)
            bad = int(stream_L.isnan().sum())
            _require(bad == 0, field.name, "numbers", f"NaN at {bad} of {tokens} tokens")
    for name, stream_L in (("coefficients_L", streams.coefficients_L), ("advantages_L", streams.advantages_L)):
        infinite = int(stream_L.isinf().sum())
        _require(infinite == 0, name, "finite numbers", f"infinity at {infinite} of {tokens} tokens")
    negative = int((streams.coefficients_L < 0).sum())
    _require(negative == 0, "coefficients_L", "numbers >= 0", f"{negative} below 0")
    paired = (streams.behaviour_logprobs_L is None) == (streams.calibrated_L is None)
    given = "calibrated_L" if streams.behaviour_logprobs_L is None else "behaviour_logprobs_L"
    _require(paired, "behaviour_logprobs_L and calibrated_L", "both or neither", f"{given} alone")
    has_reference = terms.kl_coef == 0 or streams.reference_logprobs_L is not None
    _require(has_reference, "reference_logprobs_L", f"log-probs, as kl_coef is {terms.kl_coef}", None)
    for name in ("kl_coef", "entropy_coef"):
        value = getattr(terms, name)
        _require(abs(value) < float("inf"), name, "a finite number", value)
    for name in ("clip_low", "clip_high", "w_max"):
        value = getattr(terms, name)
        _require(value >= 0, name, "a number >= 0", value)
