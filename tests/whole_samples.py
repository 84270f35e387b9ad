"""Whole samples for tests: a header with its tokens, and their plan on one machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from icrl_megatron.data.packing import lay_out, pack
from icrl_megatron.settings.schema import AlgoSettings
from icrl_megatron.types import Role, Sample, SampleTokens, StepPlan


@dataclass(frozen=True)
class Whole:
    """A sample as one rank has it that played it and trains on it."""

    sample_id: str
    group: str
    role: Role
    round: int
    behaviour_prompt_ids: tuple[int, ...]
    train_prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    rollout_logprobs: tuple[float, ...]
    calibrated: bool
    reward: float
    advantage: float = 0.0

    @property
    def loss_tokens(self) -> int:
        return sum(self.loss_mask)

    @property
    def header(self) -> Sample:
        same = self.train_prompt_ids == self.behaviour_prompt_ids
        lengths = map(len, (self.behaviour_prompt_ids, self.train_prompt_ids, self.response_ids))
        given = self.sample_id, self.group, self.role, self.round, *lengths, self.loss_tokens, same
        return Sample(*given, self.calibrated, self.reward, self.advantage)

    @property
    def tokens(self) -> SampleTokens:
        prompts = (np.array(ids, dtype=np.int32) for ids in (self.behaviour_prompt_ids, self.train_prompt_ids))
        response, mask = np.array(self.response_ids, dtype=np.int32), np.array(self.loss_mask, dtype=np.bool_)
        logprobs = np.array(self.rollout_logprobs, dtype=np.float32)
        return SampleTokens(*prompts, response, mask, logprobs, np.zeros(len(mask), dtype=np.bool_))


def packed(
    samples: Iterable[Whole],
    settings: AlgoSettings,
    *,
    align: int = 1,
    each: int = 1,
    prompt: Any = "train",
    **layout: Any,
) -> StepPlan:
    """The plan of one replica; `layout` as in `lay_out`."""
    every = list(samples)
    laid_out = lay_out([s.header for s in every], settings, **layout)
    return pack(laid_out, {s.sample_id: s.tokens for s in every}, align=align, each=each, prompt=prompt)
