"""Hints about an entry of `tasks.sources` name it by its index, and are overrides that a shell passes on whole."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from icrl_megatron.distill import command as distill
from icrl_megatron.run.checks import validate_tasks
from icrl_megatron.run.heldout import problems
from icrl_megatron.settings import loading as S
from icrl_megatron.settings.task_options import OWN, SOURCES, DataSource, source_of
from icrl_megatron.utils.errors import OWN_ENTRY, ConfigError

FIRST = "{name: household}"


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, question in (("a.jsonl", "1+1="), ("b.jsonl", "2+2=")):
        Path(name).write_text(json.dumps({"prompt": question, "label": "2"}) + "\n")
    Path("folder").mkdir()


def pasted(message: str) -> list[str]:
    assert OWN_ENTRY not in message, message
    found = re.findall(r"'tasks\.sources\.[^']+'|tasks\.sources\.\d[^\s,']*=[^\s,']+", message)
    assert found, message
    return [shlex.split(one)[0] for one in found]


@pytest.mark.parametrize("name", [n for n in SOURCES if n != OWN and isinstance(source_of(n), DataSource)])
def test_a_task_set_without_data_says_what_to_paste(name: str) -> None:
    settings = S.load("quickstart", [f"tasks.sources=[{FIRST}, {{name: {name}}}]"])
    with pytest.raises(ConfigError) as caught:
        validate_tasks(settings)
    for override in pasted(str(caught.value)):
        assert override.startswith("tasks.sources.1.data.")
        changed = S.apply_overrides(settings, [override])
        assert changed.tasks.sources[1] != settings.tasks.sources[1]
        assert changed.tasks.sources[0] == settings.tasks.sources[0]


@pytest.mark.parametrize(
    ("entry", "remedy"),
    [
        ("{name: alfworld, data: {train: [gone], heldout: [folder]}}", "data.train=[FOLDER]"),
        ("{name: webshop, data: {train: [0:4], heldout: [4:8]}}", "data.servers=[http://host:36001]"),
        ("{name: webshop, data: {train: [0:4], heldout: [4:8], servers: [host]}}", "data.servers=[http://host:36001]"),
        ("{name: math, data: {train: [a.jsonl], heldout: [a.jsonl]}}", "data.heldout=[FILE]"),
        ("{name: math, data: {train: [a.jsonl], heldout: [b.jsonl], label_column: x}}", "data.label_column=COLUMN"),
        ("{name: math, data: {train: [a.jsonl], heldout: [b.jsonl]}, agent: {tools: [search]}}", "data.corpus="),
        ("{name: math, data: {train: [a.jsonl], heldout: [b.jsonl]}, agent: {tools: [mcp]}}", "agent.mcp=["),
        ("{name: searchqa, data: {train: [a.jsonl], heldout: [b.jsonl]}, agent: {judge: model}}", "agent.endpoint={"),
    ],
)
def test_other_hints_can_be_pasted(entry: str, remedy: str) -> None:
    settings = S.load("quickstart", [f"tasks.sources=[{FIRST}, {entry}]"])
    with pytest.raises(ConfigError) as caught:
        validate_tasks(settings)
    offered = pasted(str(caught.value))
    assert offered[0].startswith(f"tasks.sources.1.{remedy}")
    for override in offered:
        S.apply_overrides(settings, [override])


def test_evaluation_and_distillation_name_the_entry_too() -> None:
    settings = S.load("quickstart", ["tasks.sources=[{name: archive}, {name: math, data: {train: [a.jsonl]}}]"])
    with pytest.raises(ConfigError) as caught:
        problems(settings, None, ["test"], None)
    assert pasted(str(caught.value)) == ["tasks.sources.1.data.heldout=[FILE]"]
    with pytest.raises(ConfigError) as caught:
        distill.prepare(settings, Path("out.jsonl"), False, split="heldout")
    assert pasted(str(caught.value)) == ["tasks.sources.1.data.heldout=[FILE]"]


TWO_WITH_FILES = f"tasks.sources=[{{name: math}}, {FIRST}, {{name: code}}]"


def test_an_option_of_task_sets_is_pasted_for_every_entry_that_has_it() -> None:
    settings = S.load("any_text", [TWO_WITH_FILES])
    for name in ("tasks.duplicates", "duplicates"):
        with pytest.raises(ConfigError) as caught:
            S.apply_overrides(settings, [f"{name}=drop"])
        changed = S.apply_overrides(settings, pasted(str(caught.value).partition("Write ")[2]))
        first, middle, last = changed.tasks.sources
        assert first.data.duplicates == last.data.duplicates == "drop"  # type: ignore[attr-defined]
        assert middle == settings.tasks.sources[1]
    with pytest.raises(ConfigError, match=r"Write tasks\.sources\.2\.data\.duplicates=drop$"):
        S.apply_overrides(settings, ["tasks.sources.2.duplicates=drop"])
    with pytest.raises(ConfigError, match=r"this run \(rulebook_hard, household\) has that option: leave it out"):
        S.load("quickstart", ["tasks.duplicates=drop"])


def test_an_unknown_setting_in_a_file_or_a_mapping_names_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("tasks: {duplicates: drop, sources: [{name: math}]}\n")
    with pytest.raises(ConfigError, match=r"did you mean tasks\.sources\.0\.data\.duplicates\?"):
        S.load(str(tmp_path / "run.yaml"))
    with pytest.raises(ConfigError, match=r"'optim\.learning_rat': did you mean optim\.learning_rate\?"):
        S.load("any_text", ["optim={learning_rat: 1e-4}"])
