"""Recipes for a machine without a GPU: a Qwen3 of a few layers made on the spot, on the embedded tasks."""

from __future__ import annotations

from icrl_megatron.settings.schema import (
    ActorSettings,
    AlgoSettings,
    CheckpointSettings,
    EvalSettings,
    LaunchSettings,
    ModelSettings,
    OptimSettings,
    RolloutSettings,
    Settings,
    TinyModel,
    WarmStart,
)
from icrl_megatron.settings.task_options import source_of
from icrl_megatron.settings.task_schema import TaskSettings


def _tiny(name: str, *sources: str) -> Settings:
    """What the CPU recipes share: one rank, fp32, word tokens, short turns."""
    return Settings(
        name=name,
        steps=100,
        model=ModelSettings(init=TinyModel()),
        tasks=TaskSettings(sources=[source_of(source) for source in sources]),
        warm_start=WarmStart(steps=300),
        rollout=RolloutSettings(max_turn_tokens=24, max_critique_tokens=24, context_tokens=512, templates="compact"),
        algo=AlgoSettings(entropy_coef=0.03),
        actor=ActorSettings(precision="fp32", micro_batch_tokens=8192),
        optim=OptimSettings(learning_rate=6e-4, weight_decay=0.0),
        eval=EvalSettings(interval=10, problems=128),
        checkpoint=CheckpointSettings(interval=20),
        launch=LaunchSettings(device="cpu"),
    )


def quickstart() -> Settings:
    """Both embedded tasks at tensor parallel 2 on two CPU cores, compared with GRPO at equal cost. Minutes."""
    settings = _tiny("quickstart", "rulebook_hard", "household")
    settings.baseline = "grpo"
    settings.steps = 170
    settings.warm_start = WarmStart(steps=800, episodes_per_step=16)
    settings.algo.entropy_coef = 0.01
    settings.actor.tensor_parallel = 2
    settings.launch.ranks = 2
    return settings


def rulebook_hard() -> Settings:
    """Rulebook with 4 slots of 8 values: too many rules to find by exploring, easy to be told. One CPU core."""
    return _tiny("rulebook_hard", "rulebook_hard")


def rulebook_easy() -> Settings:
    """Rulebook with 3 slots of 6 values, where plain GRPO learns alone. One CPU core."""
    settings = _tiny("rulebook_easy", "rulebook_easy")
    settings.steps, settings.warm_start.steps = 60, 120
    return settings


def household() -> Settings:
    """Household, a small text world played over several turns. One CPU core."""
    settings = _tiny("household", "household")
    settings.warm_start = WarmStart(steps=600, episodes_per_step=16)
    settings.optim.learning_rate, settings.algo.entropy_coef = 1e-3, 0.01
    return settings


def any_text() -> Settings:
    """A tiny model that reads bytes, for your own data, reward or task set without a GPU (docs/TASKS.md)."""
    settings = _tiny("any_text", "rulebook_easy")
    settings.model = ModelSettings(init=TinyModel(tokenizer="bytes", max_positions=4096))
    settings.warm_start = WarmStart(steps=0)
    settings.rollout.context_tokens = 2048
    settings.steps, settings.optim.learning_rate = 40, 1e-2
    settings.rollout.tasks_per_step, settings.rollout.episodes_per_task = 4, 16
    settings.algo.entropy_coef = 0.0
    settings.algo.on_no_signal = "skip"  # random bytes often earn nothing at first
    settings.eval = EvalSettings(interval=10, problems=32, samples=4, control_problems=0)
    return settings


def _archive(name: str) -> Settings:
    """Questions that only tools can answer: several turns of calls, then a number."""
    settings = _tiny(name, name)
    settings.rollout.max_turns, settings.rollout.max_turn_tokens = 14, 32
    settings.warm_start = WarmStart(steps=1000, episodes_per_step=32)
    settings.algo.entropy_coef = 0.005
    return settings


def archive() -> Settings:
    """Archive with two towns: search, page and calculator calls in one episode. One CPU core."""
    settings = _archive("archive")
    settings.steps, settings.optim.learning_rate = 120, 3e-4
    return settings


def archive_easy() -> Settings:
    """Archive with one town: whom to ask, a search that is often outdated or a page that is right. One CPU core."""
    settings = _archive("archive_easy")
    settings.steps, settings.warm_start.steps = 40, 600
    return settings
