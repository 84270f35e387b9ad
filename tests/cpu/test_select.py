"""`icrl select` with a real model: what is kept, kills, failures of the infrastructure, and what may change."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from local_servers import Handler, threaded
from whole_runs import end, icrl, start, when

pytest.importorskip("bm25s")

from icrl_megatron.evaluation.result import EvalRequest
from icrl_megatron.evaluation.run import evaluate
from icrl_megatron.evaluation.select import SelectRequest, select
from icrl_megatron.model.tiny import build_tiny
from icrl_megatron.settings.schema import TinyModel
from icrl_megatron.settings.task_sections import SearchData
from icrl_megatron.tasks.datasets import read_rows
from icrl_megatron.utils.errors import ConfigError, HopelessError

LABELS = (["yes"], ["yes", "no"], "never")
"""A model that answers at random is right sometimes, nearly always, and never."""
QUESTIONS = 18
TINY = TinyModel(hidden=32, heads=2, kv_heads=1, ffn=48, max_positions=512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose words are two answers, a search and a few others."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<answer>yes</answer>", "<answer>no</answer>", "<search>rivers</search>", "well", "so"]
    build_tiny(folder, TINY, words, seed=1)
    passage = {"contents": "Seine\nThe Seine is one of the rivers."}
    (folder.parent / "corpus.jsonl").write_text(json.dumps(passage) + "\n")
    return folder


def rows(path: Path, first: int = 0) -> list[dict[str, Any]]:
    each = range(first, first + QUESTIONS)
    made = [{"prompt": f"Question {i}?", "label": LABELS[i % 3], "from": {"page": i}} for i in each]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return made


def overrides(model: Path, folder: Path, *more: str) -> tuple[str, ...]:
    if not (folder / "rows.jsonl").exists():
        rows(folder / "rows.jsonl")
    return (
        f"tasks.sources.0.data.train=[{folder / 'rows.jsonl'}]",
        f"tasks.sources.0.data.corpus={model.parent / 'corpus.jsonl'}",
        *("tasks.sources.0.agent.format=tags", "rollout.templates=compact", "rollout.context_tokens=200"),
        *("rollout.max_turn_tokens=12", "rollout.max_turns=2", "launch.device=cpu", "rollout.concurrency=3", *more),
    )


def request(model: Path, folder: Path, *more: str, **other: Any) -> SelectRequest:
    given = {"task": "searchqa", "samples": 6, "at_least": 0.1, "at_most": 0.7, **other}
    return SelectRequest(model, folder / "kept.jsonl", overrides=overrides(model, folder, *more), **given)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "kept.report.json").read_text()))


def measured(folder: Path) -> list[dict[str, Any]]:
    return written(folder / "kept.measured.jsonl")[1:]


def command(model: Path, folder: Path, *more: str) -> list[str]:
    options = ["--task", "searchqa", "--samples", "6", "--at-least", "0.1", "--at-most", "0.7"]
    return ["select", str(model), "--out", str(folder / "kept.jsonl"), *options, *overrides(model, folder, *more)]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert select(request(model, folder)) == 0
    return folder


def test_kept_rows_are_the_rows_that_were_read(whole: Path) -> None:
    counts, given, found = report(whole), written(whole / "rows.jsonl"), measured(whole)
    success = {one["task_id"]: sum(one["successes"]) / 6 for one in found}
    assert len(success) == len(found) == QUESTIONS == counts["questions"] and counts["failed"] == 0
    inside = [i for i in range(QUESTIONS) if 0.1 <= success[f"searchqa/train/rows/{i}"] <= 0.7]
    assert written(whole / "kept.jsonl") == [given[i] for i in inside]
    assert {i % 3 for i in inside} >= {0} and all(i % 3 != 2 for i in inside)
    assert counts["kept"] == len(inside) > 0 and counts["too_hard"] >= 6
    assert counts["kept"] + counts["too_hard"] + counts["too_easy"] == QUESTIONS
    assert sum(counts["histogram"]) == QUESTIONS and counts["histogram"][0] == counts["too_hard"]
    assert counts["examples"]["too_hard"][0]["prompt"].startswith("Question")
    assert counts["tokens"]["generated"] == sum(one["generated"] for one in found) > 0
    data = SearchData(train=[str(whole / "kept.jsonl")])
    assert [row.prompt for row in read_rows(data.train[0], data)] == [given[i]["prompt"] for i in inside]


def test_rows_with_an_own_reward_are_kept(model: Path, tmp_path: Path) -> None:
    """A task set of this kind has another name than its function."""
    given = rows(tmp_path / "rows.jsonl")
    right = "def score(prompt, response, **row):\n    return float('yes' in response and int(prompt[9:-1]) % 2 == 0)\n"
    (tmp_path / "reward.py").write_text(right)
    small = [o for o in overrides(model, tmp_path) if "corpus" not in o and "agent" not in o]
    name = f"{tmp_path}/reward.py:score"
    asked = SelectRequest(
        model, tmp_path / "kept.jsonl", name, samples=6, at_least=0.1, at_most=1.0, overrides=tuple(small)
    )
    assert select(asked) == 0
    inside = sorted(int(one["task_id"].rpartition("/")[2]) for one in measured(tmp_path) if any(one["successes"]))
    assert written(tmp_path / "kept.jsonl") == [given[i] for i in inside]
    assert inside and all(i % 2 == 0 for i in inside)


def test_an_unanswered_question_is_wrong_and_counted(whole: Path) -> None:
    found = measured(whole)
    assert any(one["answered"] < 6 for one in found)
    assert all(sum(one["successes"]) <= one["answered"] for one in found)
    assert report(whole)["answered"] == sum(one["answered"] for one in found) / (6 * QUESTIONS)


def test_a_killed_command_goes_on_where_it_stopped(model: Path, whole: Path, tmp_path: Path) -> None:
    records = tmp_path / "kept.measured.jsonl"
    process = start(*command(model, tmp_path))
    when(process, lambda: records.exists() and records.read_bytes().count(b"\n") > 3)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    begun = records.read_bytes()
    finished = begun[: begun.rfind(b"\n") + 1]
    assert 3 < finished.count(b"\n") < QUESTIONS and not (tmp_path / "kept.jsonl").exists()
    with records.open("ab") as file:
        file.write(b'{"task_id": "searchqa/tr')  # what a kill in the middle of a record leaves
    code, said, error = end(start(*command(model, tmp_path)))
    assert code == 0, error
    assert f"{report(whole)['kept']} of {QUESTIONS} questions kept" in said
    assert records.read_bytes().startswith(finished)
    assert len({one["task_id"] for one in measured(tmp_path)}) == len(measured(tmp_path)) == QUESTIONS
    assert (tmp_path / "kept.jsonl").read_bytes() == (whole / "kept.jsonl").read_bytes()


def test_two_ranks_measure_the_same(model: Path, whole: Path, tmp_path: Path) -> None:
    code, _, error = icrl(*command(model, tmp_path, "launch.ranks=2", "rollout.concurrency=1"))
    assert code == 0, error
    of_task = {one["task_id"]: one for one in measured(tmp_path)}
    assert of_task == {one["task_id"]: one for one in measured(whole)}
    assert (tmp_path / "kept.jsonl").read_bytes() == (whole / "kept.jsonl").read_bytes()


class Judges(Handler):
    """An OpenAI-compatible judge that finds every answer wrong, and cannot judge one question."""

    broken = True

    def do_GET(self) -> None:
        self.send_json({"data": [{"id": "judge"}]})

    def do_POST(self) -> None:
        asked = self.body().decode()
        if Judges.broken and "Question 4?" in asked:
            self.send_json({"error": "no such model"}, 400)
        else:
            self.send_json({"choices": [{"message": {"content": "no"}}], "usage": {}})


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    with threaded(Judges) as url:
        yield f"{url}/v1"


def test_failures_are_played_again(model: Path, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = f"tasks.sources.0.agent.endpoint={{url: '{judge}', model: judge}}"
    asked = request(model, tmp_path, "tasks.sources.0.agent.judge=model", at, at_least=0.0, samples=4, problems=6)
    assert select(asked) == 0
    counts = report(tmp_path)
    assert (counts["kept"], counts["failed"], counts["questions"]) == (5, 1, 6)
    assert counts["failures"][0].startswith("searchqa/train/rows/4: ")
    assert "plays the failed questions again" in capsys.readouterr().out
    Judges.broken = False
    before = (tmp_path / "kept.measured.jsonl").read_bytes()
    assert select(asked) == 0
    after = (tmp_path / "kept.measured.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 1
    assert (report(tmp_path)["kept"], report(tmp_path)["failed"]) == (6, 0)


def test_bounds_may_change_and_nothing_is_played_again(model: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.measured.jsonl").write_bytes((whole / "kept.measured.jsonl").read_bytes())
    assert select(request(model, tmp_path, at_least=0.0, at_most=0.0)) == 0
    assert report(tmp_path)["kept"] == report(whole)["too_hard"]
    with pytest.raises(HopelessError, match=r"no question is kept of 18 \(.* see .*kept.report.json\. Other bounds"):
        select(request(model, tmp_path, at_least=0.99, at_most=0.995))
    assert (tmp_path / "kept.measured.jsonl").read_bytes() == (whole / "kept.measured.jsonl").read_bytes()


def test_other_measurements_are_not_mixed(model: Path, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    build_tiny(other, TINY, ["well"], seed=2)
    (tmp_path / "kept.measured.jsonl").write_bytes((whole / "kept.measured.jsonl").read_bytes())
    remedy = "give another --out, or delete that file to play everything again"
    for wrong, changed in (
        (replace(request(model, tmp_path), model=other), "model"),
        (request(model, tmp_path, samples=5), "samples"),
        (request(model, tmp_path, "rollout.temperature=0.7"), r"sampling\.temperature"),
        (request(model, tmp_path, "tasks.sources.0.agent.judge=f1"), r"task\.agent\.judge"),
    ):
        with pytest.raises(ConfigError, match=rf"measured with other settings \({changed}\): {remedy}"):
            select(wrong)
    rows(tmp_path / "rows.jsonl", first=1)
    with pytest.raises(ConfigError, match=f"rows/0 was another question when it was measured.*{remedy}"):
        select(request(model, tmp_path))


def test_wrong_input_is_refused_before_a_model_is_loaded(model: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"at_least": 0.5, "at_most": 0.3}, "--at-least=0.5 --at-most=0.3: give bounds from 0 to 1"),
        ({"samples": 0}, "--samples=0: must be at least 1"),
        ({"task": "archive", "overrides": ()}, "task set 'archive': `icrl select` keeps rows of data files"),
    ):
        with pytest.raises(ConfigError, match=message):
            select(replace(request(model, tmp_path), **wrong))
    asked = request(model, tmp_path)
    before = (tmp_path / "rows.jsonl").read_bytes()
    for out, message in (
        (tmp_path / "rows.jsonl", "the rows are read from there"),
        (model.parent / "corpus.jsonl", "not a file of questions that this program wrote"),
        (tmp_path / "kept.csv", "give a name that ends in .jsonl"),
    ):
        with pytest.raises(ConfigError, match=message):
            select(replace(asked, out=out))
    assert (tmp_path / "rows.jsonl").read_bytes() == before


class Retriever(Handler):
    def do_POST(self) -> None:
        found = [[{"document": {"contents": f"{query} are long"}}] for query in json.loads(self.body())["queries"]]
        self.send_json({"result": found})


def test_an_evaluation_replays_tools_without_a_network(model: Path, tmp_path: Path) -> None:
    """The retriever has ended, so an answer can only come from the cache."""
    rows(tmp_path / "heldout.jsonl", first=100)

    files = [f"tasks.sources.0.data.heldout=[{tmp_path / 'heldout.jsonl'}]"]
    files += [one for one in overrides(model, tmp_path) if "corpus" not in one]

    def play(mode: str, url: str) -> None:
        cache = (f"tasks.tool_cache.path={tmp_path / 'tools.sqlite'}", f"tasks.tool_cache.mode={mode}")
        changed = (*files, *cache, f"tasks.sources.0.data.servers=['{url}']")
        assert evaluate(EvalRequest(model, ("searchqa",), out=tmp_path / mode, overrides=changed)) == 0

    with threaded(Retriever) as url:
        play("read_write", url)
    play("replay", url)
    results = {mode: json.loads((tmp_path / mode / "eval.json").read_text()) for mode in ("read_write", "replay")}
    assert results["replay"]["successes"] == results["read_write"]["successes"]
    (score,) = results["replay"]["scores"]
    assert score["dropped"] == 0 and score["measures"]["calls_search"] > 0
    assert 0 < score["measures"]["answered"] < 1 and results["replay"]["seconds"] > 0
