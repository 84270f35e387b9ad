"""AgentGym servers: invalid settings, files of ids, and `icrl env check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from agentgym_server import TALKS, serving
from rich.console import Console

from icrl_megatron.run import checks, heldout
from icrl_megatron.settings.loading import load
from icrl_megatron.settings.task_options import ALFWorldSource, ServedSource
from icrl_megatron.settings.task_sections import GameData, ServerData
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.env_check import check
from icrl_megatron.utils.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fast")


def gym(name: str, *urls: str) -> AgentGym:
    data = ServerData(train=["0:4"], heldout=["4:6"], servers=list(urls), request_timeout_s=10.0)
    return AgentGym(ServedSource(name, data=data))


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"task_id": "7"}\n{"task_id": "7"}', "line 2: duplicate task_id 7"), ("{}", "line 1"), ("", "no rows")],
)
def test_malformed_files_of_ids_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "ids.jsonl"
    file.write_text(text)
    task_set = AgentGym(ServedSource("babyai", data=ServerData(train=[str(file)])))
    with pytest.raises(ConfigError, match=message):
        task_set.problems("train")


def test_ids_are_read_from_a_file_in_the_format_of_the_reference(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"task_id": "2420", "metadata": {"data_source": "alfworld", "subset": "pick"}}) + "\n")
    task_set = registry.of_source(ALFWorldSource("alfworld", data=GameData(train=[str(file)], heldout=["0:2"])))
    (task,) = task_set.problems("train")
    assert task.task_id == "alfworld/train/train_pick/2420" and json.loads(task.problem)["task"] == 2420
    assert [t.task_id for t in task_set.problems("heldout")] == ["alfworld/heldout/0", "alfworld/heldout/1"]


@pytest.mark.parametrize(
    ("train", "message"), [(["5:5"], "empty range"), (["nowhere.jsonl"], "neither a range"), ([], "has no train ids")]
)
def test_invalid_ids_and_addresses_are_refused(train: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AgentGym(ServedSource("babyai", data=ServerData(train=train))).problems("train")
    for urls, said in (([], "no servers"), (["host:1"], "is not an address")):
        with pytest.raises(ConfigError, match=said):
            gym("babyai", *urls).pool()


def test_a_server_of_another_environment_is_refused_before_the_run() -> None:
    with serving("babyai") as (url, _):
        gym("babyai", url).check()
        with pytest.raises(ConfigError, match=r"'webshop'.*icrl env check"):
            gym("webshop", url).check()
    with pytest.raises(ConfigError, match="cannot be reached"):
        gym("babyai", "http://127.0.0.1:9").check()


@pytest.mark.parametrize(("name", "dialect"), [("alfworld", "A"), ("webshop", "A"), ("searchqa", "A"), ("babyai", "B")])
def test_env_check_prints_environment_and_dialect(name: str, dialect: str) -> None:
    console = Console(record=True, width=200)
    with serving(name, dialect) as (url, state):
        assert check(url, name, 0, 10.0, console) == 0
        text = console.export_text()
        assert f"is a server of {name}, dialect {dialect}" in text and "after one action" in text
        assert name == "alfworld" or state.open == {}
        with pytest.raises(ConfigError, match="choose one of"):
            check(url, "chess", 0, 10.0, console)
    with pytest.raises(ConfigError, match="is the server running"):
        check("http://127.0.0.1:9", "", 0, 1.0, console)


@pytest.mark.parametrize("name", sorted(TALKS))
def test_env_check_recognizes_every_environment(name: str) -> None:
    console = Console(record=True, width=200)
    with serving(name) as (url, _):
        assert check(url, "", 0, 10.0, console) == 0
    assert f"is a server of {name}, dialect A" in console.export_text()


def test_searchqa_takes_files_and_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its recipes: the rows of the file have no prompt, whose column would be looked for."""
    monkeypatch.delenv("RANK", raising=False)
    file = tmp_path / "searchqa_test.jsonl"
    file.write_text(json.dumps({"task_id": 51588, "metadata": {"subset": "bamboogle"}}) + "\n")
    data = [f"tasks.sources.0.data.{split}=[{entry}]" for split, entry in (("train", "51713:51715"), ("heldout", file))]
    settings = load("qwen3_8b_searchqa_8xh100", [*data, "launch.device=cpu", "engine.kind=local"])
    checks.validate_tasks(settings)
    (source,) = settings.tasks.sources
    (task,) = registry.of_source(source).problems("heldout")
    assert task.task_id == "searchqa/heldout/searchqa_test_bamboogle/51588"
    assert heldout.unusable(settings, "heldout") == {} and capsys.readouterr().err == ""
