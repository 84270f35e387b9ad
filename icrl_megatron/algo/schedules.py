"""Learning-rate schedules for RL and supervised training: pure functions of the step.

To add one: write a function with the signature of `Decay`, and add its name to `SCHEDULES` (settings/schema.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from icrl_megatron.settings.schema import OptimSettings, WarmStart

Decay = Callable[[float], float]
"""Share of the decay that is done, 0 to 1 -> share of the way from the peak rate to the final rate."""


def constant(done: float) -> float:
    return 0.0


def linear(done: float) -> float:
    return done


def cosine(done: float) -> float:
    return (1.0 - math.cos(math.pi * done)) / 2.0


wsd = linear
"""Warm-up, stable, decay (arXiv 2404.06395): `linear` that starts late."""


def learning_rate(step: int, steps: int, settings: OptimSettings | WarmStart) -> float:
    """The rate of a step from 0 to `steps` - 1: a linear warm-up over `warmup_steps`, multiplied by the chosen decay.

    The decay covers the last `decay_steps` steps: by default all after the warm-up, or half of all steps with wsd.
    After the last step, the rate is `final_factor` times the peak.
    """
    rate = settings.learning_rate * min(1.0, (step + 1) / (settings.warmup_steps + 1))
    longest = steps / 2.0 if settings.schedule == "wsd" else max(1, steps - settings.warmup_steps)
    length = longest if settings.decay_steps is None else settings.decay_steps
    done = min(1.0, max(0.0, step / length - (steps / length - 1.0)))
    decay: Decay = globals()[settings.schedule]
    return rate * (1.0 - (1.0 - settings.final_factor) * decay(done))
