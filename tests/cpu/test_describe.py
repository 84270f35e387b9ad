"""`icrl settings` and its page."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_runs import icrl

from icrl_megatron.settings.describe import described, markdown
from icrl_megatron.settings.limits import CHOICES, RANGES
from icrl_megatron.settings.loading import load


def test_the_page_is_what_the_command_prints() -> None:
    page = Path(__file__).parents[2] / "docs" / "SETTINGS.md"
    assert page.read_text() == markdown(), "write it anew: icrl settings --markdown > docs/SETTINGS.md"


def test_every_setting_is_there_and_can_be_set_to_what_is_printed() -> None:
    """Defaults are printed as overrides take them."""
    found = described()
    names = {one.name.replace(".0.", ".") for one in found}
    assert set(CHOICES) <= names and len(names) == len(found)
    assert {name for name in RANGES if not name.startswith(("data.", "serve."))} <= names
    settable = [one for one in found if one.name != "model.init" and not one.name.startswith("model.init.")]
    load("quickstart", [f"{one.name}={one.default}" for one in settable if "sources" not in one.name])


def test_most_settings_say_what_they_are_for() -> None:
    assert sum(bool(one.help) for one in described()) > 0.6 * len(described())


@pytest.mark.parametrize(
    ("prefix", "code", "said"),
    [
        ("algo.overlong", 0, "algo.overlong.factor=1.0  (float; at least 0)\n    The whole penalty."),
        ("optim.schedule", 0, "optim.schedule=constant  (str; constant, linear, cosine, wsd)"),
        ("algo.over", 2, "no setting is called algo.over or begins with it"),
    ],
)
def test_a_section_a_setting_and_neither(prefix: str, code: int, said: str) -> None:
    ended, out, err = icrl("settings", prefix)
    assert ended == code and said in (err if code else out)
