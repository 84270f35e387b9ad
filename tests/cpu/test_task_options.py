"""Each task set has its own options; others are rejected by name, wherever the setting comes from."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from documented import code
from whole_runs import icrl

from icrl_megatron.run.checks import check_values, validate
from icrl_megatron.run.heldout import check_rows
from icrl_megatron.settings import loading as S
from icrl_megatron.settings.describe import described
from icrl_megatron.settings.task_options import (
    OWN,
    SOURCES,
    ALFWorldSource,
    ArchiveSource,
    SearchQASource,
    ServedSource,
    ToolsSource,
)
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.settings.task_sections import GameData, SearchData, ServerData
from icrl_megatron.tasks import registry
from icrl_megatron.utils.errors import ConfigError

GYM = "tasks.sources.0.name=reasoning_gym"
LACKS = (
    "task set 'reasoning_gym' has no such option; it has data.train, data.heldout, data.grading_workers, "
    "data.grading_timeout_s"
)
ARCHIVE = "task set 'archive' has no such option; it has agent.answer_chars, agent.grammar, agent.reward"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks.sources=[{name: reasoning_gym, data: {corpus: x}}]"], f"tasks.sources.0.data.corpus: {LACKS}"),
        (["tasks={sources: [{name: reasoning_gym, agent: {format: tags}}]}"], f"tasks.sources.0.agent.format: {LACKS}"),
        ([GYM, "tasks.sources.0.serve.count=3"], f"tasks.sources.0.serve.count: {LACKS}"),
        (["tasks.sources.0.data={passages: 9}", GYM], f"tasks.sources.0.data.passages: {LACKS}"),
        (["tasks.sources.0={name: reasoning_gym, data: {servers: [a]}}"], f"tasks.sources.0.data.servers: {LACKS}"),
        (["tasks.sources.1.name=reasoning_gym", "tasks.sources.1.agent={}"], f"tasks.sources.1.agent: {LACKS}"),
        (["tasks.sources.0.name=archive", "tasks.sources.0.agent.format=tags"], f"agent.format: {ARCHIVE}"),
        (["tasks.sources.0.name=archive", "tasks.sources.0.data.train=[a]"], f"data.train: {ARCHIVE}"),
        (["tasks.sources=[{name: mth, data: {train: [a]}}]"], "'mth' has no options: did you mean math?"),
        (["tasks.sources=[{name: household, data: {}}]"], "'household' has no options: leave it out; math, searchqa"),
        (["tasks.sources.0.data.train=[a]"], "'rulebook_hard' has no options: leave it out; math, searchqa"),
        (["tasks.sources.0.name=code", "tasks.sources.0.data.trian=[a]"], "did you mean tasks.sources.0.data.train?"),
        (["tasks.sources=[{name: code, data: {trian: [a]}}]"], "did you mean tasks.sources.0.data.train?"),
        (["tasks.sources=[{name: code, data: {train: a}}]"], "expected a list"),
    ],
)
def test_options_of_other_task_sets_are_rejected(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        S.load("quickstart", overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_option_is_rejected_before_a_model_is_loaded(tmp_path: Path) -> None:
    words = [GYM, "tasks.sources.0.data.corpus=x", "model.path=/nowhere", "--dry-run"]
    code, _, error = icrl("train", "quickstart", f"run_dir={tmp_path}", *words)
    assert code == 2 and LACKS in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [1, -1])
def test_options_are_checked_for_the_final_task_set(step: int) -> None:
    words = ["tasks.sources.0.name=searchqa", "tasks.sources.0.data.corpus=c.jsonl"]
    (first, *_) = S.load("quickstart", words[::step]).tasks.sources
    assert first == SearchQASource("searchqa", data=SearchData(corpus="c.jsonl"))


def test_changed_task_set_has_its_own_defaults_and_keeps_the_weight() -> None:
    recipe = "qwen3_8b_alfworld_4xh100"
    (source,) = S.load(recipe, ["tasks.sources.0.weight=2", "tasks.sources.0.name=webshop"]).tasks.sources
    assert source == ServedSource("webshop", 2.0)
    (same,) = S.load(recipe, ["tasks.sources.0.name=alfworld"]).tasks.sources
    assert isinstance(same, ALFWorldSource) and same.data.train == ["0:2420"] and same.served
    words = ["tasks.sources.0.agent.grammar=web", "tasks.sources.0.name=archive_easy"]
    (alike,) = S.apply_overrides(S.load("archive", words[:1]), words[1:]).tasks.sources
    assert isinstance(alike, ArchiveSource) and (alike.name, alike.agent.grammar) == ("archive_easy", "web")


@pytest.mark.parametrize("task_set", SOURCES)
def test_options_round_trip_through_files(task_set: str, tmp_path: Path) -> None:
    settings = S.load("quickstart", [f"tasks.sources.1={{name: {task_set}, weight: 3}}"])
    S.save(settings, tmp_path / "settings.yaml")
    assert S.load_saved(tmp_path / "settings.yaml") == settings
    assert type(settings.tasks.sources[1]) is SOURCES[task_set]


def test_saved_options_of_another_task_set_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("tasks: {sources: [{name: reasoning_gym, data: {corpus: x}}]}")
    with pytest.raises(ConfigError, match=r"settings\.yaml: .*'reasoning_gym' has no such option"):
        S.load_saved(tmp_path / "settings.yaml")


def test_task_sets_with_options_require_entries_of_their_class() -> None:
    assert set(SOURCES) == {*registry._WITH_OPTIONS, OWN}
    with pytest.raises(ConfigError, match=r"its entry is a TaskSource; make it with .*\.MathSource"):
        registry.of_source(TaskSource("math"))
    with pytest.raises(ConfigError, match="its entry is a ToolsSource"):
        registry.of_source(ToolsSource("household"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SearchQASource("searchqa", data=SearchData(["0:2"], ["2:3"], corpus="c")), "data.corpus=c has no effect with"),
        (
            SearchQASource("searchqa", data=SearchData(corpus="c", numeric_tolerance=0.1)),
            "no effect with agent.judge=exact",
        ),
        (SearchQASource("searchqa", data=SearchData(corpus="c", request_timeout_s=1.0)), "no effect with data.corpus"),
        (ALFWorldSource("alfworld", data=GameData(["0:2"], ["2:3"], grading_workers=4)), "no effect without folders"),
    ],
)
def test_options_without_effect_are_rejected(source: TaskSource, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.of_source(source)


def test_serve_options_without_a_command_are_rejected() -> None:
    settings = S.load("quickstart", ["tasks.sources=[{name: alfworld, serve: {count: 3}}]"])
    with pytest.raises(ConfigError, match=r"serve\.count=3 has no effect without serve\.command; leave it out"):
        validate(settings)


def test_rows_of_task_ids_are_not_compared_as_prompts(tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text(json.dumps({"task_id": "babyai_1"}) + "\n")
    source = ServedSource("babyai", data=ServerData([str(tmp_path / "ids.jsonl")], [str(tmp_path / "ids.jsonl")]))
    check_rows(source, source)


def test_documented_options_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "documented_riddles.py").write_text(code("Options of a task set"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SOURCES, "riddles", importlib.import_module("documented_riddles").RiddleSource)
    monkeypatch.setitem(registry._WITH_OPTIONS, "riddles", "documented_riddles:Riddles")
    S.field_types.cache_clear()
    try:
        (source,) = S.load("quickstart", ["tasks.sources=[{name: riddles, data: {tries: 2}}]"]).tasks.sources
        assert registry.of_source(source).data.tries == 2  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r"has no such option; it has data\.train, .*, data\.tries$"):
            S.load("quickstart", ["tasks.sources=[{name: riddles, data: {passages: 2}}]"])
        with pytest.raises(ConfigError, match=r"data\.tries=0: must be a finite number, at least 1"):
            check_values(S.load("quickstart", ["tasks.sources=[{name: riddles, data: {tries: 0}}]"]))
        (tries,) = described("tasks.sources.0.data.tries")
        assert (tries.task_sets, tries.help) == (("riddles",), "Answers that an attempt may give.")
    finally:
        S.field_types.cache_clear()
