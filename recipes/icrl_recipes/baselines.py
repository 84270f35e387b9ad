"""The baselines of the paper's tables, with the tasks, hardware and hyper-parameters of the ICRL runs."""

from __future__ import annotations

from icrl_megatron.settings.schema import Settings
from icrl_recipes.qwen3 import critique_grpo, grpo


def grpo_4b_alfworld_2xh100() -> Settings:
    """GRPO on ALFWorld with Qwen3-4B: one of the three behind the paper's agentic average of 49.2. 2 H100.

    Planned: 44 GiB of a GPU in training, 52 GiB of cache in rollouts; 74 s a step.
    """
    return grpo("grpo_4b_alfworld_2xh100", "4B", "alfworld", gpus=2)


def grpo_8b_alfworld_4xh100() -> Settings:
    """GRPO on ALFWorld with Qwen3-8B: one of the three behind the paper's agentic average of 52.8. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 71 s a step.
    """
    return grpo("grpo_8b_alfworld_4xh100", "8B", "alfworld", gpus=4)


def grpo_4b_webshop_2xh100() -> Settings:
    """GRPO on WebShop with Qwen3-4B: one of the three behind the paper's agentic average of 49.2. 2 H100.

    Planned: 44 GiB of a GPU in training, 52 GiB of cache in rollouts; 74 s a step.
    """
    return grpo("grpo_4b_webshop_2xh100", "4B", "webshop", gpus=2)


def grpo_8b_webshop_4xh100() -> Settings:
    """GRPO on WebShop with Qwen3-8B: one of the three behind the paper's agentic average of 52.8. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 66 s a step.
    """
    return grpo("grpo_8b_webshop_4xh100", "8B", "webshop", gpus=4)


def grpo_4b_searchqa_4xh100() -> Settings:
    """GRPO on SearchQA with Qwen3-4B: one of the three behind the paper's agentic average of 49.2. 4 H100.

    Planned: 32 GiB of a GPU in training, 52 GiB of cache in rollouts; 31 s a step.
    """
    return grpo("grpo_4b_searchqa_4xh100", "4B", "searchqa", gpus=4)


def grpo_8b_searchqa_8xh100() -> Settings:
    """GRPO on SearchQA with Qwen3-8B: one of the three behind the paper's agentic average of 52.8. 8 H100.

    Planned: 46 GiB of a GPU in training, 48 GiB of cache in rollouts; 33 s a step.
    """
    return grpo("grpo_8b_searchqa_8xh100", "8B", "searchqa", gpus=8)


def grpo_8b_math_4xh100() -> Settings:
    """GRPO on mathematics with Qwen3-8B: 68.3 on average over five sets in the paper. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 24 s a step.
    """
    return grpo("grpo_8b_math_4xh100", "8B", "math", gpus=4)


def critique_grpo_4b_alfworld_2xh100() -> Settings:
    """Critique-GRPO on ALFWorld with Qwen3-4B: one of the three behind the paper's agentic average of 55.9. 2 H100.

    Planned: 44 GiB of a GPU in training, 24 GiB of cache in rollouts; 113 s a step.
    """
    return critique_grpo("critique_grpo_4b_alfworld_2xh100", "4B", "alfworld", gpus=2)


def critique_grpo_8b_alfworld_4xh100() -> Settings:
    """Critique-GRPO on ALFWorld with Qwen3-8B: one of the three behind the paper's agentic average of 56.6. 4 H100.

    Planned: 58 GiB of a GPU in training, 20 GiB of cache in rollouts; 107 s a step.
    """
    return critique_grpo("critique_grpo_8b_alfworld_4xh100", "8B", "alfworld", gpus=4)


def critique_grpo_4b_webshop_2xh100() -> Settings:
    """Critique-GRPO on WebShop with Qwen3-4B: one of the three behind the paper's agentic average of 55.9. 2 H100.

    Planned: 44 GiB of a GPU in training, 24 GiB of cache in rollouts; 123 s a step.
    """
    return critique_grpo("critique_grpo_4b_webshop_2xh100", "4B", "webshop", gpus=2)


def critique_grpo_8b_webshop_4xh100() -> Settings:
    """Critique-GRPO on WebShop with Qwen3-8B: one of the three behind the paper's agentic average of 56.6. 4 H100.

    Planned: 58 GiB of a GPU in training, 20 GiB of cache in rollouts; 108 s a step.
    """
    return critique_grpo("critique_grpo_8b_webshop_4xh100", "8B", "webshop", gpus=4)


def critique_grpo_4b_searchqa_4xh100() -> Settings:
    """Critique-GRPO on SearchQA with Qwen3-4B: one of the three behind the paper's agentic average of 55.9. 4 H100.

    Planned: 33 GiB of a GPU in training, 24 GiB of cache in rollouts; 45 s a step.
    """
    return critique_grpo("critique_grpo_4b_searchqa_4xh100", "4B", "searchqa", gpus=4)


def critique_grpo_8b_searchqa_8xh100() -> Settings:
    """Critique-GRPO on SearchQA with Qwen3-8B: one of the three behind the paper's agentic average of 56.6. 8 H100.

    Planned: 46 GiB of a GPU in training, 20 GiB of cache in rollouts; 46 s a step.
    """
    return critique_grpo("critique_grpo_8b_searchqa_8xh100", "8B", "searchqa", gpus=8)


def critique_grpo_8b_math_4xh100() -> Settings:
    """Critique-GRPO on mathematics with Qwen3-8B: 73.3 on average over five sets in the paper. 4 H100.

    Planned: 58 GiB of a GPU in training, 20 GiB of cache in rollouts; 43 s a step.
    """
    return critique_grpo("critique_grpo_8b_math_4xh100", "8B", "math", gpus=4)
