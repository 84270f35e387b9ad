"""The interface of the torch and Triton implementations of the head: chunk sizes, outputs, gradients, and methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from icrl_kernels.objective import Streams, Terms


@dataclass(frozen=True)
class Chunking:
    """How the head is computed. Except for the rounding of bf16 logits, the result does not depend on it."""

    tokens: int | None = None
    """Tokens whose logits exist at one time; None: chosen for the device."""
    backend: str = "auto"
    """auto | torch | triton. auto: triton for tensors on a GPU, torch elsewhere. triton supports fp32 and bf16
    inputs."""
    logits: str = "fp32"
    """fp32 | bf16: dtype of a chunk's stored logits. bf16 (triton with bf16 inputs only) halves the buffer and rounds
    logits of 16 to 32 by up to 0.06; docs/KERNEL.md has the effect on log-probs and calibration weights."""


def spans(tokens: int, chunk: int) -> Iterator[slice]:
    """Ranges of at most `chunk` tokens that cover 0 to `tokens`."""
    return (slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


@dataclass(frozen=True)
class TokenOutputs:
    """The outputs per token: [L] tensors, filled chunk by chunk."""

    loss_L: Tensor
    logprobs_L: Tensor
    entropy_L: Tensor
    ratio_L: Tensor
    calibration_weight_L: Tensor
    clipped_low_L: Tensor
    clipped_high_L: Tensor
    finite_L: Tensor
    """bool: logits and loss are finite, whatever the coefficient."""

    @classmethod
    def empty(cls, like_L: Tensor, dtype: torch.dtype) -> TokenOutputs:
        """Uninitialized outputs, one number per token of `like_L`."""
        floats = [torch.empty_like(like_L, dtype=dtype) for _ in range(5)]
        return cls(*floats, *[torch.empty_like(like_L, dtype=torch.bool) for _ in range(3)])


@dataclass(frozen=True)
class Gradients:
    """Gradient buffers; None if not needed."""

    hidden_LH: Tensor | None
    """In the dtype of the hidden states; each chunk writes its own rows."""
    weight_VH: Tensor | None
    """fp32 (fp64 for fp64 inputs), this rank's rows; each chunk adds to all of them."""
    weight_scale: float = 1.0
    """Factor on what is added to `weight_VH`."""


@dataclass(frozen=True)
class Slopes:
    """Derivatives of a loss with respect to each token's log-prob and entropy, [C] each."""

    logprob_C: Tensor
    entropy_C: Tensor | None
    """None if the loss has no entropy term."""
    silent_C: Tensor
    """bool: tokens that contribute nothing, whatever their logits."""


class Chunks(Protocol):
    """One pass of the head over one set of inputs."""

    tokens: int
    """Tokens per chunk."""
    dtype: torch.dtype
    """Dtype of the per-token outputs."""

    def score(self, span: slice, targets_C: Tensor, logprobs_C: Tensor, entropy_C: Tensor) -> None:
        """Computes log-probs and entropies of a chunk."""

    def train(self, span: slice, streams: Streams, terms: Terms, outputs: TokenOutputs, grads: Gradients) -> None:
        """Writes rows `span` of the outputs, and adds the chunk's gradients. `streams` has only the chunk's tokens."""

    def backward(self, span: slice, targets_C: Tensor, slopes: Slopes, grads: Gradients) -> None:
        """Recomputes the chunk's logits and adds the gradients for `slopes`."""
