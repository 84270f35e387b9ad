"""Published steps of NeMo-RL on H100, that the planner must reproduce before it predicts anything.

Source: docs/about/performance-summary.md of NVIDIA-NeMo/RL at v0.5 (Llama, on-policy) and v0.4 (the other two), with
the recipes under examples/configs/recipes/llm/performance: packed micro-batches of 4,096 tokens, four updates of 512
answers a step, one scoring pass, head over every position; Llama with full recomputation, Qwen3-32B without.
A published rate counts prompts too; rate x GPUs x seconds / answers - answer length gives the prompts' lengths.
The errors of step and of rate are therefore one error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from icrl_megatron.model.flops import Passes
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.plan import timing
from icrl_megatron.plan.calibration import CONSTANTS, Constants
from icrl_megatron.plan.hardware import GPUS
from icrl_megatron.plan.layout import Layout, engine_parameters
from icrl_megatron.plan.models import PUBLISHED
from icrl_megatron.plan.workload import single_turn

LLAMA_8B = ModelShape(32, 4096, 32, 8, 128, 14336, 128_256, False, 5e5, 1e-5, 131_072)
PROMPTS, ANSWERS, WINDOW = 64, 32, 4096
UPDATES = 4
ENGINE_MEMORY = 0.6
"""Share of the GPU that the engine may use in the recipes' base configuration."""
SPREAD = 0.7
"""Assumed: standard deviation of an answer's length over its mean (only the mean is published)."""


@dataclass(frozen=True)
class PublishedRun:
    """A row of the tables."""

    name: str
    shape: ModelShape
    layout: Layout
    answer_tokens: float
    tokens_a_second_a_gpu: float
    step_s: float
    fitted: bool
    """Whether a constant was chosen to meet it."""

    @property
    def prompt_tokens(self) -> float:
        whole = self.tokens_a_second_a_gpu * self.layout.gpus * self.step_s / (PROMPTS * ANSWERS)
        return whole - self.answer_tokens


_LLAMA = Layout(16, pipeline=2, micro_batch_tokens=WINDOW)
_QWEN = Layout(32, 4, 4, sequence_parallel=True, recompute="none", micro_batch_tokens=WINDOW, engine_tensor=4)
ROWS = (
    PublishedRun("Llama-3.1-8B, 16 H100, v0.5", LLAMA_8B, _LLAMA, 1019, 1581, 92.8, fitted=True),
    PublishedRun("Llama-3.1-8B, 16 H100, v0.4", LLAMA_8B, _LLAMA, 1060, 1562, 97.7, fitted=False),
    PublishedRun("Qwen3-32B, 32 H100, v0.4", PUBLISHED["Qwen3-32B"], _QWEN, 3206, 540, 393.0, fitted=False),
)


@dataclass(frozen=True)
class Reproduced:
    """What the planner makes of a row."""

    row: PublishedRun
    times: timing.Times
    tokens_a_second_a_gpu: float

    @property
    def step_error(self) -> float:
        return self.times.total / self.row.step_s - 1

    @property
    def rate_error(self) -> float:
        return self.tokens_a_second_a_gpu / self.row.tokens_a_second_a_gpu - 1


NEMO_RL = replace(CONSTANTS, training_efficiency=0.27, layer_launch_s=0.0, optimizer_bytes=40.0, host_sample_s=0.0)
"""Constants of NeMo-RL, whose micro-batches are small: the efficiency is fitted to the first row, and
covers its launches and its host's work too."""


def reproduce(row: PublishedRun, constants: Constants = NEMO_RL) -> Reproduced:
    """The planner's step for a published row, from its published inputs."""
    gpu, most = GPUS["h100"], WINDOW - row.prompt_tokens
    work = single_turn(PROMPTS, ANSWERS, row.prompt_tokens, row.answer_tokens, SPREAD, most)
    weights = engine_parameters(row.shape, row.layout.engine_tensor) * row.layout.item
    cache = ENGINE_MEMORY * gpu.memory_bytes - weights - constants.engine_workspace_bytes
    passes = Passes(updates=UPDATES, scored=1, head_everywhere=True)
    times = timing.estimate(row.shape, row.layout, work, passes, gpu, cache, constants)
    return Reproduced(row, times, work.trained_tokens / times.total / row.layout.gpus)
