"""Near-duplicates of texts without comparing all pairs: MinHash (Broder, 1997) with an index of bands (LSH)."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Shingles = frozenset[int]

WORDS = 3
"""Of a shingle."""
HASHES = 120
_MISSED = 0.005
"""Largest probability that a pair at the threshold shares no band."""
_MOST_IN_BUCKET, _MOST_COMPARED = 50, 20
"""Texts that a bucket keeps, and that a new text is compared with, those that share the most bands first. So the time
grows with the number of texts and not with its square, even if most of them are alike."""
_ROWS = (12, 10, 8, 6, 5, 4, 3, 2)
"""Hashes in a band: divisors of HASHES."""
_RANDOM = np.random.default_rng(1997)
_FACTORS = _RANDOM.integers(0, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _RANDOM.integers(0, 2**63, HASHES, dtype=np.uint64)
_CJK = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")


def shingles(text: str) -> Shingles:
    """Hashes of all runs of WORDS words, whatever their case and white space; of all words together if there are fewer.
    Each character of scripts without spaces is a word."""
    words = _WORD.findall(text.casefold())
    runs = (" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))
    return frozenset(_hash(run) for run in runs) if words else frozenset()


def similarity(one: Shingles, other: Shingles) -> float:
    """Jaccard: the share of all shingles that both texts have; 0 for two empty texts."""
    return len(one & other) / len(one | other) if one or other else 0.0


class Index:
    """Texts that were seen, to find one that is similar to a new one."""

    def __init__(self, threshold: float) -> None:
        """`threshold`: the similarity from which two texts are near-duplicates, in [0.5, 1]."""
        self.threshold, self.compared = threshold, 0
        fine = [rows for rows in _ROWS if (1 - threshold**rows) ** (HASHES // rows) <= _MISSED]
        self._rows = fine[0] if fine else _ROWS[-1]
        self._texts: list[tuple[str, Shingles]] = []
        self._buckets: dict[bytes, list[int]] = {}

    def add(self, name: str, text: Shingles) -> None:
        """Adds a text; without shingles, it is like no other."""
        if text:
            self._texts.append((name, text))
        for key in self._keys(text):
            bucket = self._buckets.setdefault(key, [])
            if len(bucket) < _MOST_IN_BUCKET:
                bucket.append(len(self._texts) - 1)

    def find(self, text: Shingles) -> str | None:
        """The name of a text that is at least as similar as the threshold; or None."""
        shared = Counter(number for key in self._keys(text) for number in self._buckets.get(key, ()))
        for number in sorted(shared, key=lambda n: (-shared[n], n))[:_MOST_COMPARED]:
            self.compared += 1
            name, other = self._texts[number]
            if similarity(text, other) >= self.threshold:
                return name
        return None

    def _keys(self, text: Shingles) -> Iterator[bytes]:
        if not text:
            return
        signature = _signature(text)
        for begin in range(0, HASHES, self._rows):
            yield begin.to_bytes(2, "big") + signature[begin : begin + self._rows].tobytes()


def _signature(text: Shingles) -> npt.NDArray[np.uint64]:
    hashes = np.fromiter(text, dtype=np.uint64, count=len(text))
    smallest = np.full(HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
    for begin in range(0, len(hashes), 4096):  # bounds the memory of long texts
        rows = hashes[begin : begin + 4096, None] * _FACTORS + _TERMS
        np.minimum(smallest, rows.min(axis=0), out=smallest)
    return smallest


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")
