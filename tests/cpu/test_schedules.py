"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math

import pytest
from documented import defined

from icrl_megatron.algo import schedules
from icrl_megatron.algo.schedules import learning_rate
from icrl_megatron.run.checks import validate_settings
from icrl_megatron.settings import limits, schema
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.schema import SCHEDULES, OptimSettings, WarmStart
from icrl_megatron.utils.errors import ConfigError


def rates(steps: int, **settings: object) -> list[float]:
    optim = OptimSettings(learning_rate=2.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, steps, optim) for step in range(steps)]


def test_constant_after_a_linear_warm_up() -> None:
    assert rates(5) == [2.0] * 5
    assert rates(5, warmup_steps=3) == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear_and_cosine_decay_after_the_warm_up() -> None:
    assert rates(4, schedule="linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(6, schedule="linear", warmup_steps=2, final_factor=0.5)[2:] == pytest.approx([2.0, 1.75, 1.5, 1.25])
    expected = [1.0 + math.cos(math.pi * step / 8) for step in range(8)]
    assert rates(8, schedule="cosine") == pytest.approx(expected)


def test_wsd_is_constant_and_then_linear() -> None:
    assert rates(8, schedule="wsd") == [2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates(8, schedule="wsd", decay_steps=2) == [2.0] * 7 + [1.0]


@pytest.mark.parametrize("steps", [7, 60, 120])
def test_warm_start_rate_has_its_closed_form(steps: int) -> None:
    """Bit for bit: linear to a tenth over the last half."""
    warm = WarmStart(steps=steps)
    for step in range(steps):
        late = max(0.0, 2.0 * step / steps - 1.0)
        before = warm.learning_rate * min(1.0, (step + 1) / (warm.warmup_steps + 1)) * (1.0 - 0.9 * late)
        assert learning_rate(step, steps, warm) == before


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_stay_within_bounds(schedule: str) -> None:
    for warmup, decay, steps in ((0, None, 1), (10, None, 5), (3, 100, 20), (0, 1, 3)):
        found = rates(steps, schedule=schedule, warmup_steps=warmup, decay_steps=decay, final_factor=0.25)
        assert all(0 < rate <= 2.0 for rate in found)


def test_documented_schedule_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "square_root", defined("A schedule")["square_root"], raising=False)
    known = limits.limits_of(schema.OptimSettings)
    monkeypatch.setitem(known, "schedule", limits.Choice((*SCHEDULES, "square_root")))  # type: ignore[arg-type]
    settings = load("rulebook_easy", ["optim.schedule=square_root", "steps=4", "optim.learning_rate=2.0"])
    validate_settings(settings)
    found = [learning_rate(step, 4, settings.optim) for step in range(4)]
    assert found == pytest.approx([2.0 * (1 - (step / 4) ** 0.5) for step in range(4)])


def test_decay_steps_without_a_decaying_schedule_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"optim\.decay_steps=5 has no effect with optim\.schedule=constant"):
        validate_settings(load("rulebook_easy", ["optim.decay_steps=5"]))
