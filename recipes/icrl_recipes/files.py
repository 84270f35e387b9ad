"""The recipe of `icrl sft DATA`: supervised training of a pretrained model on files of conversations."""

from __future__ import annotations

from icrl_megatron.settings.schema import ActorSettings, Settings, WarmStart


def sft() -> Settings:
    """What `icrl sft DATA model.path=FOLDER` runs: two epochs of a pretrained model on files of conversations."""
    return Settings(
        name="sft",
        warm_start=WarmStart(epochs=2, learning_rate=1e-5, warmup_steps=5, schedule="cosine"),
        actor=ActorSettings(precision="bf16", recompute="full"),
    )
