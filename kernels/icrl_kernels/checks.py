"""Validates the head's arguments before any computation or communication. A ValueError names the argument.

Conditions on tensor values are evaluated in one batch, so that the host waits for a GPU only once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor

from icrl_kernels.chunking import Chunking
from icrl_kernels.objective import Streams, Terms
from icrl_kernels.vocabulary import VocabShard

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that the Triton kernels support."""
FLOAT32_MAX = torch.finfo(torch.float32).max


def _require(condition: bool, argument: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


@dataclass(frozen=True)
class _Question:
    """A condition on tensor values, and the error if it does not hold."""

    holds: Tensor
    argument: str
    expected: str
    got: Callable[[], object]


def _ask(questions: list[_Question]) -> None:
    if not questions:
        return
    for question, holds in zip(questions, torch.stack([q.holds for q in questions]).tolist(), strict=True):
        _require(holds, question.argument, question.expected, question.got() if not holds else "")


def check_products(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    targets_L: Tensor,
    temperature: float,
    shard: VocabShard,
    chunking: Chunking,
    main_grad_VH: Tensor | None = None,
) -> None:
    """Checks shapes, dtypes, devices and ranges of the arguments that both heads have.

    Raises:
        ValueError: names the argument, the expected and the actual value.
    """
    _require(hidden_LH.dim() == 2, "hidden_LH", "two dimensions [tokens, hidden]", list(hidden_LH.shape))
    kernels = chunking.backend == "triton" or (chunking.backend == "auto" and hidden_LH.is_cuda)
    dtypes = KERNEL_DTYPES if kernels else FLOATING
    _require(hidden_LH.dtype in dtypes, "hidden_LH", f"one of {', '.join(map(str, dtypes))}", hidden_LH.dtype)
    tokens, width = hidden_LH.shape
    wanted = f"[vocabulary of this rank, {width}]"
    _require(weight_VH.dim() == 2 and weight_VH.shape[1] == width, "weight_VH", wanted, list(weight_VH.shape))
    same = weight_VH.dtype == hidden_LH.dtype
    _require(same, "weight_VH", f"the dtype of hidden_LH, {hidden_LH.dtype}", weight_VH.dtype)
    _require(targets_L.dtype == torch.int64, "targets_L", "torch.int64", targets_L.dtype)
    _require(targets_L.shape == (tokens,), "targets_L", f"shape [{tokens}], as hidden_LH", list(targets_L.shape))
    for name, tensor in (("hidden_LH", hidden_LH), ("weight_VH", weight_VH), ("targets_L", targets_L)):
        _require(tensor.is_contiguous(), name, "a contiguous tensor", f"strides {tensor.stride()}")
        here = f"the device of hidden_LH, {hidden_LH.device}"
        _require(tensor.device == hidden_LH.device, name, here, tensor.device)
    _require(_is_number(temperature), "temperature", "a finite number above 0", repr(temperature))
    _require(0 < temperature < float("inf"), "temperature", "a finite number above 0", temperature)
    # The kernels multiply by log2(e) / T.
    warm = math.log2(math.e) / temperature < FLOAT32_MAX
    _require(warm, "temperature", "a number whose inverse float32 can hold", temperature)
    _check_chunking(chunking, kernels, hidden_LH.dtype)
    _check_shard(shard, weight_VH.shape[0])
    if main_grad_VH is not None:
        _require(main_grad_VH.shape == weight_VH.shape, "main_grad", "the weight's shape", list(main_grad_VH.shape))
        wide = torch.float64 if hidden_LH.dtype == torch.float64 else torch.float32
        _require(main_grad_VH.dtype == wide, "main_grad", str(wide), main_grad_VH.dtype)
        here = f"the device of weight_VH, {weight_VH.device}"
        _require(main_grad_VH.device == weight_VH.device, "main_grad", here, main_grad_VH.device)


def check_targets(targets_L: Tensor, shard: VocabShard) -> None:
    """Checks that every target is in the vocabulary.

    Raises:
        ValueError: names the expected and the actual values.
    """
    _ask(_targets(targets_L, shard, torch.ones_like(targets_L, dtype=torch.bool)))


def _targets(targets_L: Tensor, shard: VocabShard, live_L: Tensor) -> list[_Question]:
    if not len(targets_L):
        return []
    inside = ((targets_L >= 0) & (targets_L < shard.vocabulary) | ~live_L).all()

    def got() -> str:
        return f"ids from {targets_L[live_L].min()} to {targets_L[live_L].max()}"

    return [_Question(inside, "targets_L", f"ids in 0 to {shard.vocabulary - 1}", got)]


def _check_chunking(chunking: Chunking, kernels: bool, dtype: torch.dtype) -> None:
    tokens = chunking.tokens
    whole = tokens is None or (isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1)
    _require(whole, "chunking.tokens", "None or an integer of at least 1", repr(tokens))
    for name, values in (("backend", ("auto", "torch", "triton")), ("logits", ("fp32", "bf16"))):
        value = getattr(chunking, name)
        _require(value in values, f"chunking.{name}", " or ".join(values), value)
    if chunking.logits == "bf16":
        _require(kernels and dtype == torch.bfloat16, "chunking.logits", "fp32 but for triton with bf16 inputs", "bf16")


def _check_shard(shard: VocabShard, rows: int) -> None:
    _require(0 <= shard.valid <= rows, "shard.valid", f"0 to {rows}, the rows of weight_VH", shard.valid)
    ends = shard.start + shard.valid
    within = shard.vocabulary >= 1 and (shard.valid == 0 or (shard.start >= 0 and ends <= shard.vocabulary))
    _require(within, "shard", f"columns within 0 to {shard.vocabulary}", f"{shard.start} to {ends}")
    if shard.group is not None:
        _require(dist.is_initialized(), "shard.group", "an initialized torch.distributed", "none; initialize it first")
        _require(_is_member(shard.group), "shard.group", "a group that this rank is in", repr(shard.group))
    if shard.ranks() == 1:
        alone = f"{shard.vocabulary} without a group of more ranks"
        _require(shard.valid == shard.vocabulary, "shard.valid", alone, shard.valid)


def _is_member(group: dist.ProcessGroup) -> bool:
    try:
        return dist.get_rank(group) >= 0
    except Exception:  # torch raises various errors for a destroyed group, or for an object that is not a group
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_objective(hidden_LH: Tensor, streams: Streams, terms: Terms, shard: VocabShard) -> None:
    """Checks shapes, dtypes, devices and values of the streams, and the scalars of the objective.

    For a token whose coefficient is 0, only the coefficient is checked.

    Raises:
        ValueError: names the argument, the expected and the actual value.
    """
    tokens = hidden_LH.shape[0]
    for name in (field.name for field in fields(terms)):
        value = getattr(terms, name)
        _require(_is_number(value), name, "a number", repr(value))
    for field in fields(streams):
        stream_L = getattr(streams, field.name)
        if stream_L is None:
            continue
        _require(stream_L.shape == (tokens,), field.name, f"shape [{tokens}], as hidden_LH", list(stream_L.shape))
        here = f"the device of hidden_LH, {hidden_LH.device}"
        _require(stream_L.device == hidden_LH.device, field.name, here, stream_L.device)
        if field.name == "calibrated_L":
            _require(stream_L.dtype == torch.bool, field.name, "torch.bool", stream_L.dtype)
        elif field.name != "targets_L":
            _require(stream_L.dtype in FLOATING, field.name, "a floating dtype", stream_L.dtype)
    _ask(_values(streams, shard))
    paired = (streams.behaviour_logprobs_L is None) == (streams.calibrated_L is None)
    given = "calibrated_L" if streams.behaviour_logprobs_L is None else "behaviour_logprobs_L"
    _require(paired, "behaviour_logprobs_L and calibrated_L", "both or neither", f"{given} alone")
    has_reference = terms.kl_coef == 0 or streams.reference_logprobs_L is not None
    _require(has_reference, "reference_logprobs_L", f"log-probs, as kl_coef is {terms.kl_coef}", None)
    for name in ("kl_coef", "entropy_coef"):
        value = getattr(terms, name)
        _require(abs(value) < float("inf"), name, "a finite number", value)
    for name in ("clip_low", "clip_high", "w_max", "shaping_gamma"):
        value = getattr(terms, name)
        _require(value >= 0, name, "a number >= 0", value)


def _values(streams: Streams, shard: VocabShard) -> list[_Question]:
    """Conditions on the values of streams with correct shapes and dtypes."""
    coefficients_L = streams.coefficients_L
    live_L, negative_L = coefficients_L != 0, coefficients_L < 0
    asked = _numbers("coefficients_L", coefficients_L, live_L, True)
    got = lambda: f"{int(negative_L.sum())} below 0"  # noqa: E731 (as short as a def is long)
    asked.append(_Question(~negative_L.any(), "coefficients_L", "numbers >= 0", got))
    asked += _targets(streams.targets_L, shard, live_L) + _numbers("advantages_L", streams.advantages_L, live_L, True)
    for name in ("old_logprobs_L", "behaviour_logprobs_L", "reference_logprobs_L"):
        stream_L = getattr(streams, name)
        if stream_L is not None:
            asked += _numbers(name, stream_L, live_L, False)
    return asked


def _numbers(name: str, stream_L: Tensor, live_L: Tensor, finite: bool) -> list[_Question]:
    def at(bad_L: Tensor) -> str:
        return f"at {int(bad_L.sum())} of {len(bad_L)} tokens"

    nan_L = stream_L.isnan() & live_L
    asked = [_Question(~nan_L.any(), name, "numbers", lambda: f"NaN {at(nan_L)}")]
    if finite:
        infinite_L = stream_L.isinf() & live_L
        asked.append(_Question(~infinite_L.any(), name, "finite numbers", lambda: f"infinity {at(infinite_L)}"))
    return asked
