"""The paper's own runs (arXiv 2605.15224): ICRL on each of its tasks, on the hardware that it used."""

from __future__ import annotations

from icrl_megatron.settings.schema import Settings
from icrl_recipes.qwen3 import icrl


def qwen3_4b_alfworld_2xh100() -> Settings:
    """ICRL's Qwen3-4B on ALFWorld, one of the three behind the paper's agentic average of 57.0. 2 H100.

    Planned: 44 GiB of a GPU in training, 52 GiB of cache in rollouts; 123 s a step.
    """
    return icrl("qwen3_4b_alfworld_2xh100", "4B", "alfworld", gpus=2)


def qwen3_8b_alfworld_4xh100() -> Settings:
    """ICRL's Qwen3-8B on ALFWorld, one of the three behind the paper's agentic average of 57.8. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 115 s a step.
    """
    return icrl("qwen3_8b_alfworld_4xh100", "8B", "alfworld", gpus=4)


def qwen3_4b_webshop_2xh100() -> Settings:
    """ICRL's Qwen3-4B on WebShop, one of the three behind the paper's agentic average of 57.0. 2 H100.

    Planned: 44 GiB of a GPU in training, 52 GiB of cache in rollouts; 137 s a step.
    """
    return icrl("qwen3_4b_webshop_2xh100", "4B", "webshop", gpus=2)


def qwen3_8b_webshop_4xh100() -> Settings:
    """ICRL's Qwen3-8B on WebShop, one of the three behind the paper's agentic average of 57.8. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 122 s a step.
    """
    return icrl("qwen3_8b_webshop_4xh100", "8B", "webshop", gpus=4)


def qwen3_4b_searchqa_4xh100() -> Settings:
    """ICRL's Qwen3-4B on SearchQA, one of the three behind the paper's agentic average of 57.0. 4 H100.

    Planned: 32 GiB of a GPU in training, 52 GiB of cache in rollouts; 50 s a step.
    """
    return icrl("qwen3_4b_searchqa_4xh100", "4B", "searchqa", gpus=4)


def qwen3_8b_searchqa_8xh100() -> Settings:
    """ICRL's Qwen3-8B on SearchQA, one of the three behind the paper's agentic average of 57.8. 8 H100.

    Planned: 46 GiB of a GPU in training, 48 GiB of cache in rollouts; 51 s a step.
    """
    return icrl("qwen3_8b_searchqa_8xh100", "8B", "searchqa", gpus=8)


def qwen3_8b_math_4xh100() -> Settings:
    """ICRL's Qwen3-8B on mathematics: 75.3 on average over MATH500, Minerva, OlympiadBench, AIME24 and AMC23 in the
    paper, 65.1 on AIME24. 4 H100.

    Planned: 58 GiB of a GPU in training, 48 GiB of cache in rollouts; 45 s a step.
    """
    return icrl("qwen3_8b_math_4xh100", "8B", "math", gpus=4)
