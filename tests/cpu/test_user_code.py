"""Code of users by name: recipes, settings files, task sets."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from icrl_megatron.run.conversation_checks import as_recipe
from icrl_megatron.run.heldout import problems
from icrl_megatron.run.teach_checks import check_teachable
from icrl_megatron.settings.loading import apply_overrides, load, to_yaml
from icrl_megatron.settings.schema import Settings
from icrl_megatron.settings.task_options import OwnSource, source_of
from icrl_megatron.tasks import registry
from icrl_megatron.types import Task
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.user_code import load as load_code

TASK_SET = """
    from icrl_megatron.types import Task

    class Plain:
        name = "plain"
        def problems(self, split):
            return [Task(f"plain/{split}/0", "plain", split, split)]
        def environment(self, task):
            raise NotImplementedError

    class WithEntry(Plain):
        def __init__(self, entry):
            self.entry = entry

    class Fails:
        def __init__(self):
            raise ValueError("no data")

    class NoProblems:
        name = "none"

    number = 3
    """


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return tmp_path


def write(path: Path, code: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(code))


@pytest.mark.parametrize("name", ["own_sets.py:{}", "./own_sets.py:{}", "own_package_a.sets:{}"])
def test_a_task_set_is_found_in_files_and_modules(folder: Path, name: str) -> None:
    write(folder / "own_sets.py", TASK_SET)
    write(folder / "own_package_a" / "sets.py", TASK_SET)
    plain = registry.of_source(source_of(name.format("Plain")))
    assert plain.name == "plain" and plain.problems("train")[0].problem == "train"
    chosen = [f"tasks.sources.0.name={name.format('WithEntry')}", "tasks.sources.0.options={letters: 6, a: b}"]
    settings = apply_overrides(Settings(), chosen)
    (source,) = settings.tasks.sources
    made = registry.of_source(source)
    assert made.entry.options == {"letters": 6, "a": "b"}  # type: ignore[attr-defined]
    assert isinstance(source, OwnSource)


def test_tasks_find_their_task_set_by_its_own_name(folder: Path) -> None:
    write(folder / "named.py", TASK_SET)
    catalogue = registry.Catalogue([source_of("household"), source_of("./named.py:Plain")])
    with pytest.raises(NotImplementedError):
        catalogue.environment(Task("plain/train/0", "plain", "train", "train"))
    assert catalogue.get("plain") is catalogue.get("./named.py:Plain")
    assert catalogue.get("household").name == "household"
    with pytest.raises(ConfigError, match="unknown task set 'plane'"):
        catalogue.get("plane")


def test_an_evaluation_has_the_held_out_problems_of_an_own_task_set(folder: Path) -> None:
    write(folder / "held.py", TASK_SET)
    settings = apply_overrides(Settings(), ["tasks.sources.0.name=./held.py:Plain"])
    (task,) = problems(settings, settings, ["plain"], None)
    assert task.task_id == "plain/heldout/0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing.py:Plain", "no file"),
        ("no_such_package.sets:Plain", "no module no_such_package.sets"),
        ("./wrong.py:Plane", "has no 'Plane'; it has"),
        ("./wrong.py:Fails", r"ValueError: no data \(.*wrong.py, line \d+\)"),
        ("./wrong.py:NoProblems", "no task set; give it a name"),
        ("./wrong.py:number", "is 3; name a reward function"),
        ("./wrong.py:", "write FILE.py:NAME"),
        ("./broken.py:Plain", "importing .*broken.py fails: SyntaxError"),
        ("./exits.py:Plain", "importing .*exits.py fails: SystemExit"),
        ("./needs.py:Plain", "No module named 'no_such_library'"),
        ("needs:Plain", "No module named 'no_such_library'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(folder: Path, name: str, message: str) -> None:
    write(folder / "wrong.py", TASK_SET)
    write(folder / "broken.py", "def (")
    write(folder / "exits.py", "raise SystemExit(0)")
    write(folder / "needs.py", "import no_such_library")
    with pytest.raises(ConfigError, match=message) as raised:
        registry.of_source(source_of(name))
    assert f"name={name}" in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.sources.0.options={a: 1}", "options.* has no effect because Plain takes no argument"),
        ("tasks.sources.0.reward.low=-1", "reward.low.* has no effect with a class"),
    ],
)
def test_settings_that_a_class_never_reads_are_refused(folder: Path, override: str, message: str) -> None:
    write(folder / "unread.py", TASK_SET)
    settings = apply_overrides(Settings(), ["tasks.sources.0.name=./unread.py:Plain", override])
    with pytest.raises(ConfigError, match=message):
        registry.of_source(settings.tasks.sources[0])


def test_a_file_sees_its_neighbours_and_hides_no_package(folder: Path) -> None:
    write(folder / "sub" / "uses.py", "import beside_uses, json\nvalue = beside_uses.value, json.dumps({})")
    write(folder / "sub" / "beside_uses.py", "value = 1")
    write(folder / "sub" / "json.py", "")
    assert load_code("sub/uses.py:value", "setting") == (1, "{}")


RECIPE = """
    from icrl_recipes.tiny import any_text

    def run():
        settings = any_text()
        settings.steps = 7
        return settings

    def wrong():
        return 7

    def fails():
        raise KeyError("x")
    """


def test_a_recipe_is_a_function_or_a_file_of_settings(folder: Path) -> None:
    write(folder / "my_recipe.py", RECIPE)
    settings = load("my_recipe.py:run", ["seed=3"])
    assert (settings.steps, settings.seed, settings.name) == (7, 3, "any_text")
    (folder / "all.yaml").write_text(to_yaml(settings))
    assert load("all.yaml") == settings
    (folder / "some.yml").write_text("steps: 9\ntasks: {sources: [{name: household, weight: 2}]}\n")
    some = load("some.yml", ["name=x"])
    assert (some.steps, some.name, some.tasks.sources[0].weight) == (9, "x", 2.0)
    assert as_recipe("some.yml", ()) == ("some.yml", [])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("bad_recipe.py:wrong", "returns int; return icrl_megatron.settings.schema.Settings"),
        ("bad_recipe.py:fails", r"raises KeyError: 'x' \(.*bad_recipe.py, line 13\)"),
        ("bad_recipe.py:none", "has no 'none'"),
        ("none.yaml", "none.yaml: cannot be read as settings"),
        ("typo.yaml", "typo.yaml: cannot be read as settings .*stepz"),
        ("list.yaml", "not a mapping"),
        ("any_txt", "did you mean any_text"),
    ],
)
def test_recipes_that_are_none_are_refused(folder: Path, recipe: str, message: str) -> None:
    write(folder / "bad_recipe.py", RECIPE)
    (folder / "typo.yaml").write_text("stepz: 9\n")
    (folder / "list.yaml").write_text("[1]\n")
    with pytest.raises(ConfigError, match=message):
        load(recipe)


def test_a_task_set_without_words_needs_a_tokenizer_of_bytes(folder: Path) -> None:
    write(folder / "wordless.py", TASK_SET)
    name = "tasks.sources.0.name=./wordless.py:Plain"
    with pytest.raises(ConfigError, match="'plain' has no vocabulary"):
        check_teachable(load("rulebook_easy", [name]))
    with pytest.raises(ConfigError, match="'plain' has no teacher"):
        check_teachable(load("rulebook_easy", [name, "model.init.tokenizer=bytes"]))
    check_teachable(load("rulebook_easy", [name, "model.init.tokenizer=bytes", "warm_start.steps=0"]))
    check_teachable(load("rulebook_easy"))
