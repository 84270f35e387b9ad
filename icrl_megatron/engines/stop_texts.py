"""Stop strings of the local engine: finds the token that completes one, even in the middle of the token."""

from __future__ import annotations

from typing import Any

import torch

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a token that holds a part of a character decodes to."""


class StopTexts:
    """The stop strings of a request, for one tokenizer."""

    def __init__(self, tokenizer: Any, texts: tuple[str, ...], vocabulary: int) -> None:
        """`vocabulary`: V, rows of the model's head. Raises ValueError for an empty stop string."""
        if not all(texts):
            raise ValueError("a stop string is empty")
        self._tokenizer, self._texts = tokenizer, texts
        self._tail = max(len(text.encode()) for text in texts)
        """Tokens that can hold a stop string: each has at least one byte of it."""
        ends = {text[-1] for text in texts}
        if not all(end.isascii() for end in ends):
            ends.add(_REPLACEMENT)
        pieces = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
        self.completing_V = torch.zeros(vocabulary, dtype=torch.bool)
        """Tokens that contain a stop string's last character: only these are worth decoding a reply for."""
        self.completing_V[: len(pieces)] = torch.tensor([any(end in piece for end in ends) for piece in pieces])

    def completed(self, ids: list[int]) -> bool:
        """Whether the last tokens of a reply hold a stop string."""
        tail = str(self._tokenizer.decode(ids[-self._tail :]))
        return any(text in tail for text in self._texts)


class StopRows:
    """Stop strings of the rows of a batch. Shapes: R rows, S distinct sets of stop strings, V vocabulary."""

    def __init__(self, of_row: list[StopTexts | None], device: torch.device) -> None:
        distinct = list(dict.fromkeys(found for found in of_row if found is not None))
        self._of_row = of_row
        self._set_R = torch.tensor([distinct.index(s) if s is not None else -1 for s in of_row], device=device)
        self._completing_SV = torch.stack([s.completing_V for s in distinct]).to(device) if distinct else None

    def ended(self, tokens_R: torch.Tensor, ids_NR: torch.Tensor, alive_R: torch.Tensor) -> torch.Tensor:
        """Which of the live rows completed a stop string with their newest token. `ids_NR`: the tokens so far."""
        ended_R = torch.zeros_like(alive_R)
        if self._completing_SV is None:
            return ended_R
        maybe_R = self._completing_SV[self._set_R.clamp(min=0), tokens_R] & (self._set_R >= 0) & alive_R
        for row in maybe_R.nonzero().flatten().tolist():
            texts = self._of_row[row]
            ended_R[row] = texts is not None and texts.completed(ids_NR[:, row].tolist())
        return ended_R

    def select(self, keep: torch.Tensor) -> None:
        """Drops all rows but these."""
        self._set_R = self._set_R[keep]
        self._of_row = [self._of_row[row] for row in keep.tolist()]
