"""Beyond the paper: FP8, more nodes, larger models, and first runs that need no environment servers."""

from __future__ import annotations

from icrl_megatron.settings.schema import EngineSettings, Settings
from icrl_recipes.qwen3 import icrl


def _on_local_engine(settings: Settings) -> Settings:
    """Which leaves the actor's state its room: nothing has to be moved for it."""
    settings.engine, settings.actor.offload = EngineSettings(kind="local"), "none"
    return settings


def qwen3_8b_math_8xh100_fp8() -> Settings:
    """The mathematics run on a whole node with FP8 products (blockwise scaling); reproduces nothing yet. 8 H100.

    Planned: 53 GiB of a GPU in training, 48 GiB of cache in rollouts; 38 s a step.
    """
    settings = icrl("qwen3_8b_math_8xh100_fp8", "8B", "math", gpus=8)
    settings.actor.fp8 = "blockwise"
    return settings


def qwen3_8b_2nodes() -> Settings:
    """The 8B ALFWorld run with twice the tasks a step, data parallel over two nodes. 16 H100.

    Planned: 40 GiB of a GPU in training, 48 GiB of cache in rollouts; 86 s a step.
    """
    settings = icrl("qwen3_8b_2nodes", "8B", "alfworld", gpus=16)
    settings.rollout.tasks_per_step = 32
    return settings


def qwen3_32b_4nodes() -> Settings:
    """Qwen3-32B on ALFWorld, a size that the paper does not train: TP 8, engines of 8. 32 H100.

    Planned: 44 GiB of a GPU in training, 48 GiB of cache in rollouts; 121 s a step.
    """
    settings = icrl("qwen3_32b_4nodes", "32B", "alfworld", gpus=32)
    settings.rollout.tasks_per_step = 32
    settings.actor.tensor_parallel = 8
    settings.engine.tensor_parallel = 8
    return settings


def qwen3_4b() -> Settings:
    """Qwen3-4B on the embedded Household with the local engine: a first run on 2 H100 that needs only the model.

    Planned: 43 GiB of a GPU in training, 31 GiB of cache in rollouts; 9 s a step.
    """
    settings = icrl("qwen3_4b", "4B", "household", gpus=2)
    return _on_local_engine(settings)


def qwen3_8b() -> Settings:
    """Qwen3-8B on the embedded Household with the local engine: a first run on 4 H100 that needs only the model.

    Planned: 57 GiB of a GPU in training, 11 GiB of cache in rollouts; 10 s a step.
    """
    settings = icrl("qwen3_8b", "8B", "household", gpus=4)
    return _on_local_engine(settings)
