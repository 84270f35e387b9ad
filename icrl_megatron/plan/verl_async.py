"""verl's published asynchronous runs, which the simulation must reproduce before it predicts anything.

Source: docs/advance/fully_async.md of verl-project/verl ("Asynchronous Training on 7B Model" and the ablation of
staleness): Qwen2.5-Math-7B on H20s, steps of 512 prompts with 16 answers of at most 28k tokens, four updates a step,
rollouts cut off and continued at weight syncs. From recipe/fully_async_policy/shell/dapo_7b_math_fsdp2_64_64.sh:
engines of TP 4 with 0.8 of the memory, and 16 prompts a server at once from its rollouter. Nothing is dropped there.
A row's own training time is an input. Answer lengths are not published.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from icrl_megatron.plan.async_plan import engines_of
from icrl_megatron.plan.async_simulation import (
    EnginePool,
    Group,
    LeadRule,
    SimulatedOutcome,
    SimulatedTurn,
    Trainer,
    simulate,
)
from icrl_megatron.plan.hardware import Gpu
from icrl_megatron.plan.layout import Layout, Serving, engine_bytes, kv_bytes_a_token
from icrl_megatron.plan.models import PUBLISHED

H20 = Gpu("h20", 96e9, 148e12, 296e12, 4.0e12, 450e9, 50e9, 64e9, "published specifications of the NVIDIA H20")
SHAPE = PUBLISHED["Qwen2.5-7B-Instruct"]
"""Qwen2.5-Math-7B has the same."""
PROMPTS, ANSWERS, LONGEST, PARTS = 512, 16, 28 * 1024, 4
ENGINE_TENSOR, ENGINE_MEMORY, ANSWERS_AT_ONCE = 4, 0.8, 16 * 16
PROMPT_TOKENS = 200.0
"""Assumed."""
SPREAD = 1.0
"""Assumed: standard deviation of an answer's length over its mean, before the cut."""
TOKENS_A_TRAINED_GPU_SECOND = 0.3955
"""FITTED to the row with staleness 0 alone: mean tokens of an answer, before the cut, for each GPU second of a step's
training. The lengths differ between the runs and are not published, so they are derived from it."""
STEPS, SKIP = 14, 4


@dataclass(frozen=True)
class PublishedAsyncRun:
    """Half of the GPUs train, and half play."""

    gpus: int
    staleness: float
    step_s: float
    waiting_s: float
    """"gen": what the trainer waits for answers."""
    update_s: float
    fitted: bool = False

    @property
    def mean_tokens(self) -> float:
        return TOKENS_A_TRAINED_GPU_SECOND * self.update_s * self.gpus / 2


ROWS = (
    PublishedAsyncRun(128, 0.0, 231.34, 128.47, 98.77, fitted=True),
    PublishedAsyncRun(128, 0.1, 171.30, 58.17, 109.12),
    PublishedAsyncRun(128, 0.3, 146.11, 38.88, 103.22),
    PublishedAsyncRun(128, 0.5, 150.63, 33.14, 113.16),
    PublishedAsyncRun(64, 0.5, 189.26, 28.46, 156.98),
    PublishedAsyncRun(32, 0.5, 294.77, 21.26, 313.81),
)
COLOCATED_ROLLOUTS = {32: 357.41, 64: 150.72, 128: 177.85}
"""GPUs -> published seconds of the rollouts ("gen") of a colocated synchronous step."""


@dataclass(frozen=True)
class ReproducedAsyncRun:
    row: PublishedAsyncRun
    step_s: float
    waiting_s: float

    @property
    def step_error(self) -> float:
        """The speedup's error is the same: the synchronous step is as published."""
        return self.step_s / self.row.step_s - 1


def answers(mean: float, seed: int = 0) -> Callable[[int], Group]:
    variance = math.log1p(SPREAD**2)

    def group(number: int) -> Group:
        rng = np.random.default_rng((seed, number))
        drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), ANSWERS)
        lengths = np.clip(np.rint(drawn), 1, LONGEST).tolist()
        reads = [PROMPT_TOKENS, *([0.0] * (ANSWERS - 1))]  # a prompt's answers share it
        return tuple((SimulatedTurn(n, PROMPT_TOKENS + n / 2, r),) for n, r in zip(lengths, reads, strict=True))

    return group


def engines(gpus: int, answers_at_once: int) -> EnginePool:
    layout = Layout(gpus, engine_tensor=ENGINE_TENSOR, serving=Serving(most_running=answers_at_once))
    cache = ENGINE_MEMORY * H20.memory_bytes - engine_bytes(SHAPE, layout)
    tokens = cache / kv_bytes_a_token(SHAPE, ENGINE_TENSOR, layout.item)
    return replace(engines_of(SHAPE, layout, H20, tokens, answers_at_once), shared_queue=True)


def reproduce(
    row: PublishedAsyncRun, mean_tokens: float | None = None, steps: int = STEPS, skip: int = SKIP
) -> ReproducedAsyncRun:
    """The simulated step; `mean_tokens` replaces the lengths that are derived from the row's training time."""
    trainer = Trainer(PROMPTS, fixed_s=row.update_s, parts=PARTS)
    group = answers(row.mean_tokens if mean_tokens is None else mean_tokens)
    rule = LeadRule(steps, row.staleness, drop=False, adaptive=False)
    out: SimulatedOutcome = simulate(engines(row.gpus // 2, ANSWERS_AT_ONCE), trainer, rule, group)
    return ReproducedAsyncRun(row, out.step_s(skip), out.waited_s(skip))


def colocated_rollout_s(gpus: int, mean_tokens: float) -> float:
    """Seconds of the rollouts of a synchronous step on all GPUs."""
    made = engines(gpus, PROMPTS * ANSWERS)
    return simulate(made, Trainer(PROMPTS, fixed_s=1.0), LeadRule(3, drop=False), answers(mean_tokens)).waited_s(1)


def main() -> None:
    """Prints the comparison: `python -m icrl_megatron.plan.verl_async`."""
    fitted = ROWS[0].mean_tokens
    print("GPUs  staleness  published step, waiting  simulated step, waiting  error   one length for all rows")
    for row in ROWS:
        one, same = reproduce(row), reproduce(row, fitted)
        print(
            f"{row.gpus:4}  {row.staleness:9}  {row.step_s:14.1f}, {row.waiting_s:6.1f}  {one.step_s:14.1f}, "
            f"{one.waiting_s:6.1f}  {one.step_error:+7.1%}  {same.step_s:.1f} ({same.step_error:+.1%})"
            + ("  fitted" if row.fitted else ""),
            flush=True,
        )
    for gpus, published in COLOCATED_ROLLOUTS.items():
        found = colocated_rollout_s(gpus, fitted)
        print(f"colocated rollouts on {gpus}: {found:.1f} s, published {published} s ({found / published - 1:+.1%})")


if __name__ == "__main__":
    main()
