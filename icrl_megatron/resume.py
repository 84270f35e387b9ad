"""Which settings of a run may change when it is resumed. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from icrl_megatron import settings as settings_module
from icrl_megatron.config import ConfigError, Settings

MAY_CHANGE_ON_RESUME = (
    "steps",
    "max_generated_tokens",
    "run_dir",
    "eval.",
    "checkpoint.",
    "launch.",
    "engine.",
    "rollout.concurrency",
    "rollout.environment_timeout_s",
    "tasks.sources.data.servers",
    "tasks.sources.data.request_timeout_s",
    "tasks.sources.data.grading_workers",
    "tasks.sources.serve.",
    "actor.tensor_parallel",
    "actor.pipeline_parallel",
    "actor.sequence_parallel",
    "actor.recompute",
    "actor.offload",
    "actor.micro_batch_tokens",
    "actor.head_chunk_tokens",
    "actor.head_backend",
)
"""What a run that goes on may have different from how it began, names or sections: how long, how often, how
fast, on which grid and beside which servers. Anything else would make the curve of one run out of two experiments."""


def check_resume(saved: Settings, settings: Settings, folder: Path) -> None:
    """Raises ConfigError if `settings` cannot go on with a run that was begun with `saved`, naming what differs."""
    changed = settings_module.changed(saved, settings)
    allowed = [name for name in changed if _may_change(name)]
    differing = {name: values for name, values in changed.items() if name not in allowed}
    if differing:
        listed = ", ".join(f"{name} (was {was!r}, now {now!r})" for name, (was, now) in differing.items())
        harmless = f" ({', '.join(allowed)} may differ)" if allowed else ""
        raise ConfigError(
            f"{folder} holds a run with other settings: {listed}{harmless}. "
            "Give the same values to go on with it, or name=... or run_dir=... for a new run"
        )


def _may_change(name: str) -> bool:
    plain = re.sub(r"\.\d+(?=\.)", "", name)  # every element of a list alike
    return any(plain == free or (free.endswith(".") and plain.startswith(free)) for free in MAY_CHANGE_ON_RESUME)
