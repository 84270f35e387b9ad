"""`icrl settings` and docs/SETTINGS.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from whole_runs import icrl

from icrl_megatron.settings.describe import Setting, described, markdown
from icrl_megatron.settings.limits import Choice, Range
from icrl_megatron.settings.loading import field_types, load
from icrl_megatron.settings.task_options import SOURCES, options, source_of
from icrl_megatron.settings.task_schema import TaskSource


def test_the_page_is_the_output_of_the_command() -> None:
    page = Path(__file__).parents[2] / "docs" / "SETTINGS.md"
    assert page.read_text() == markdown(), "update it with: icrl settings --markdown > docs/SETTINGS.md"


def test_every_setting_is_listed_with_a_default_that_is_a_valid_override() -> None:
    found = described()
    assert len({(one.name, one.task_sets) for one in found}) == len(found)
    assert {re.sub(r"\.0\.", ".", one.name) for one in found} == {
        name for name in field_types() if not any(other.startswith(f"{name}.") for other in field_types())
    }
    settable = [one for one in found if one.name != "model.init" and not one.name.startswith("model.init.")]
    load("quickstart", [f"{one.name}={one.default}" for one in settable if ".0." not in one.name])


@pytest.mark.parametrize("task_set", SOURCES)
def test_every_option_of_a_task_set_is_listed_with_a_valid_default(task_set: str) -> None:
    own = {one.name: one.default for one in described("tasks.sources.0") if task_set in one.task_sets}
    own = {name: default for name, default in own.items() if ".0." not in name.partition(".0.")[2]}
    lists = ("agent.mcp", "reward.more")
    names = {f"tasks.sources.0.{name}" for name, _ in options(source_of(task_set)) if name not in lists}
    assert names - set(own) == {f"tasks.sources.0.{name}" for name, _ in options(TaskSource())} and set(own) <= names
    overrides = [f"{name}={value}" for name, value in own.items()]
    assert load("archive", [*overrides, f"tasks.sources.0.name={task_set}"]).tasks.sources == [source_of(task_set)]


@pytest.mark.parametrize("setting", described(), ids=lambda one: one.name)
def test_every_setting_has_a_range_or_choices_and_help(setting: Setting) -> None:
    """Numbers have a range with the default in it, texts with choices have the default among them unless others are
    allowed, and all have help that is a sentence and does not repeat the list of choices."""
    if setting.kind.startswith(("int", "float")):
        assert isinstance(setting.limit, Range)
        assert setting.default == "null" or setting.limit.low <= float(setting.default) <= setting.limit.high
    elif setting.kind == "str" and setting.limit:
        assert isinstance(setting.limit, Choice)
        assert setting.default.strip("'") in setting.limit.names or setting.limit.other
    assert len(setting.help) > 10 and setting.help[-1] in ".)" and " | " not in setting.help


def test_settings_whose_help_explains_words_have_choices() -> None:
    """The help explains each choice as "word: meaning"."""
    for setting in described():
        word = re.search(r"(?:^|[.] )([a-z_0-9]+): ", setting.help)
        if setting.kind == "str" and word and setting.default != "''":
            assert isinstance(setting.limit, Choice) and word[1] in setting.limit.names, setting.name


FACTOR = "The full penalty, subtracted from the reward."


@pytest.mark.parametrize(
    ("prefix", "code", "said"),
    [
        ("algo.overlong", 0, f"algo.overlong.factor=1.0  (float; at least 0)\n    {FACTOR}"),
        ("optim.schedule", 0, "optim.schedule=constant  (str; constant, linear, cosine, wsd)"),
        ("algo.loss", 0, "algo.loss=icrl  (str; icrl, gspo, cispo, package.module:function)"),
        ("trackers.names", 0, "trackers.names=[]  (list[str]; any of wandb, mlflow, trackio)"),
        ("algo.over", 2, "no setting is called algo.over or begins with it"),
    ],
)
def test_a_section_or_a_setting_is_printed_and_another_prefix_refused(prefix: str, code: int, said: str) -> None:
    ended, out, err = icrl("settings", prefix)
    assert ended == code and said in (err if code else out)
