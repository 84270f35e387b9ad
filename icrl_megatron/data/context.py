"""Divides a packed micro-batch among context-parallel ranks.

Each sequence is cut into 2 x CP chunks of equal length, and rank c has chunks c and 2 CP - 1 - c (zigzag, as in
Megatron-Core and Transformer Engine). Under causal attention an early chunk has little work and a late one much, so all
ranks have the same amount. Everything that belongs to a token goes with it: a loss token is on the rank that has the
position that predicts it. Its target was read from the whole micro-batch, so it may be a token of another rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from icrl_megatron.types import IntArray, MicroBatch
from icrl_megatron.utils.portions import Portion


@dataclass(frozen=True)
class BatchShare(MicroBatch):
    """What a context-parallel rank has of a micro-batch. T and L are its own tokens, and `loss_index_L` points into
    them; `cu_seqlens` is still that of the whole."""

    whole: MicroBatch
    tokens: Portion
    loss: Portion


def owners(cu_seqlens: npt.NDArray[np.int32], ranks: int) -> IntArray:
    """The rank [T] that has each token of the packed sequences. Raises ValueError unless the length of every sequence
    is a multiple of 2 x `ranks`."""
    lengths = np.diff(cu_seqlens).astype(np.int64)
    if (lengths % (2 * ranks)).any():
        raise ValueError(f"sequences of {lengths.tolist()} tokens: {ranks} ranks need multiples of {2 * ranks}")
    position_T = np.arange(int(cu_seqlens[-1])) - np.repeat(cu_seqlens[:-1], lengths)
    chunk_T = position_T // np.repeat(lengths // (2 * ranks), lengths)
    found: IntArray = np.minimum(chunk_T, 2 * ranks - 1 - chunk_T)
    return found


def share(batch: MicroBatch, ranks: int, rank: int) -> MicroBatch:
    """The `BatchShare` of `rank`, or the micro-batch itself if there is one rank. Raises ValueError as `owners`."""
    if ranks == 1:
        return batch
    owner_T = owners(batch.cu_seqlens, ranks)
    tokens = Portion.of(owner_T, ranks, rank)
    loss = Portion.of(owner_T[batch.loss_index_L], ranks, rank)
    return BatchShare(
        tokens_T=batch.tokens_T[tokens.own],
        positions_T=batch.positions_T[tokens.own],
        cu_seqlens=batch.cu_seqlens,
        loss_index_L=tokens.places[batch.loss_index_L[loss.own]] - rank * tokens.longest,
        targets_L=batch.targets_L[loss.own],
        rollout_logprobs_L=batch.rollout_logprobs_L[loss.own],
        advantages_L=batch.advantages_L[loss.own],
        coefficients_L=batch.coefficients_L[loss.own],
        calibrated_L=batch.calibrated_L[loss.own],
        same_prompt_L=batch.same_prompt_L[loss.own],
        stale_L=batch.stale_L[loss.own],
        sample_index_L=batch.sample_index_L[loss.own],
        whole=batch,
        tokens=tokens,
        loss=loss,
    )
