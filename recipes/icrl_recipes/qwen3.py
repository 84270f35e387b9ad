"""Qwen3 with the hyper-parameters of ICRL's published training code (arXiv 2605.15224), for H100s.

The model is yours to name: `model.path=/where/Qwen3-4B`, a folder in Hugging Face's layout.
"""

from __future__ import annotations

from icrl_megatron.config import (
    ActorSettings,
    LaunchSettings,
    OptimSettings,
    RolloutSettings,
    Settings,
    TaskSettings,
    TaskSource,
)


def _qwen3(name: str, ranks: int) -> Settings:
    return Settings(
        name=name,
        steps=300,
        tasks=TaskSettings(sources=[TaskSource("household")]),
        rollout=RolloutSettings(
            tasks_per_step=16,
            episodes_per_task=8,
            rounds=2,
            temperature=1.0,
            max_turn_tokens=2048,
            max_critique_tokens=1024,
            max_turns=30,
            context_tokens=16384,
        ),
        actor=ActorSettings(
            tensor_parallel=2,
            sequence_parallel=True,
            recompute="full",
            precision="bf16",
            micro_batch_tokens=16384,
        ),
        optim=OptimSettings(learning_rate=1e-6, beta1=0.9, beta2=0.98, weight_decay=0.1, clip_grad=1.0),
        launch=LaunchSettings(ranks=ranks, device="cuda"),
    )


def qwen3_4b() -> Settings:
    """Qwen3-4B on 2 H100, tensor parallel 2 (set model.path)."""
    return _qwen3("qwen3_4b", ranks=2)


def qwen3_8b() -> Settings:
    """Qwen3-8B on 4 H100, tensor parallel 2 x data parallel 2 (set model.path)."""
    return _qwen3("qwen3_8b", ranks=4)
