"""Which elements of an array each of several ranks has, and how the whole is put together again. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from icrl_megatron.types import IntArray


@dataclass(frozen=True)
class Portion:
    """The elements of an array that one of several ranks has, and where all of them are.

    Example: rank 1 of 2 has the middle of [a b c d]: Portion(own=[1, 2], places=[0, 2, 3, 1], longest=2)
    """

    own: IntArray
    """Indices into the whole array, ascending."""
    places: IntArray
    """Place of each element of the whole array in all ranks' portions end to end, each padded to `longest`."""
    longest: int
    """Elements of the largest portion."""

    @staticmethod
    def of(owner_N: IntArray, ranks: int, rank: int) -> Portion:
        """The portion of `rank` of an array whose elements belong to `owner_N`."""
        counts = np.bincount(owner_N, minlength=ranks)
        order = np.argsort(owner_N, kind="stable")
        sorted_N = owner_N[order]
        places = np.empty(len(owner_N), dtype=np.int64)
        places[order] = np.arange(len(owner_N)) - (np.cumsum(counts) - counts)[sorted_N] + sorted_N * counts.max()
        return Portion(np.flatnonzero(owner_N == rank), places, int(counts.max()))
