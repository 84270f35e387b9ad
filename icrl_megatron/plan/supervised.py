"""Memory and time of a supervised step on files (`warm_start.data`), before RL. docs/PLANNER.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from icrl_megatron.model.flops import Passes
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.plan import memory, timing
from icrl_megatron.plan.calibration import CONSTANTS
from icrl_megatron.plan.hardware import GIB, Gpu
from icrl_megatron.plan.layout import Layout
from icrl_megatron.plan.workload import Workload
from icrl_megatron.settings.schema import Settings
from icrl_megatron.utils.errors import ConfigError

TOKENS_STEP = 1024
"""Lengths that are tried for a remedy are multiples of it."""


@dataclass(frozen=True)
class SupervisedPlan:
    """A step in which every conversation has the greatest length: an upper bound. Predicted, never measured."""

    conversations: int
    longest: int
    """Tokens of a conversation."""
    tokens: int
    """Tokens of the longest micro-batch."""
    peak: float
    """Bytes on the fullest GPU."""
    available: float
    seconds: float
    remedy: str
    """The change of settings that would make it fit; empty if this does."""

    def line(self) -> str:
        fits = " (does not fit)" if self.remedy else ""
        return (
            f"supervised training before RL (warm_start): peak {self.peak / GIB:.2f} GiB of {self.available / GIB:.2f}"
            f"{fits} with {self.tokens} tokens in a micro-batch; a step of {self.conversations} conversations takes "
            f"{self.seconds:.1f} s if each has {self.longest} tokens, and less if they are shorter"
        )

    def require_fit(self) -> None:
        """Raises ConfigError naming the memory missing and what would fit."""
        if self.remedy:
            raise ConfigError(
                f"supervised training with warm_start.max_tokens={self.longest} does not fit: {self.tokens} tokens in "
                f"a micro-batch need {self.peak / GIB:.1f} GiB of a GPU's {self.available / GIB:.1f}; {self.remedy}"
            )


def supervised(settings: Settings, shape: ModelShape, layout: Layout, gpu: Gpu) -> SupervisedPlan | None:
    """None if the run trains on no files. There are no engines in this stage, and nothing is offloaded."""
    warm = settings.warm_start
    if settings.start_from or not (warm.wanted and warm.data):
        return None
    longest = warm.max_tokens or settings.rollout.context_tokens
    lengths_S = np.full(warm.episodes_per_step, float(longest))
    zero_S = np.zeros_like(lengths_S)
    work = Workload(1, zero_S, zero_S, zero_S, zero_S, zero_S, zero_S, lengths_S, lengths_S)
    times = timing.estimate(shape, layout, work, Passes(1, 0), gpu, float(gpu.memory_bytes))
    tokens = max(layout.micro_batch_tokens, longest)
    peak = _peak(settings, shape, layout, tokens)
    remedy = "" if peak <= gpu.memory_bytes else _remedy(settings, shape, layout, gpu, tokens)
    return SupervisedPlan(
        len(lengths_S), longest, tokens, peak, float(gpu.memory_bytes), times.update + CONSTANTS.step_fixed_s, remedy
    )


def _peak(settings: Settings, shape: ModelShape, layout: Layout, tokens: int) -> float:
    micro_batches = math.ceil(settings.warm_start.episodes_per_step / layout.data)
    held = memory.state(shape, layout).total + memory.activations(shape, layout, tokens, micro_batches)
    held += memory.head(shape, layout, settings, tokens)
    return held * (1 + CONSTANTS.fragmentation) + CONSTANTS.reserved_bytes


def _remedy(settings: Settings, shape: ModelShape, layout: Layout, gpu: Gpu, tokens: int) -> str:
    for most in range(tokens // TOKENS_STEP * TOKENS_STEP, 0, -TOKENS_STEP):
        if _peak(settings, shape, layout, most) <= gpu.memory_bytes:
            return f"lower warm_start.max_tokens and actor.micro_batch_tokens to {most} or less"
    return "raise actor.tensor_parallel, actor.pipeline_parallel or actor.context_parallel"
