"""Rows in the columns of published question sets: written here from their descriptions, and damaged ones."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import pickle
import zlib
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from sandboxes import sandboxed

from icrl_megatron.settings.task_options import SearchQASource, ToolsSource
from icrl_megatron.settings.task_sections import SHAPES, Rows, SearchData, ToolData
from icrl_megatron.tasks import program_rows, row_shapes
from icrl_megatron.tasks.datasets import left_out, read_rows
from icrl_megatron.tasks.registry import of_source
from icrl_megatron.utils.errors import ConfigError


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def hidden(text: str, canary: str) -> str:
    key = hashlib.sha256(canary.encode()).digest()
    return base64.b64encode(bytes(a ^ b for a, b in zip(text.encode(), cycle(key), strict=False))).decode()


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


STDIN = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
CALLS = [{"input": '[1, 2]\n"a"', "output": "true", "testtype": "functional"}]


def gaia(number: int, **other: Any) -> dict[str, Any]:
    row = {"task_id": f"x-{number}", "Question": f"Question {number}?", "Level": 2, "Final answer": "17"}
    return {**row, "file_name": "", "file_path": "", "Annotator Metadata": {"Steps": "1. Search"}, **other}


def code(tests: list[dict[str, str]], private: str, **other: Any) -> dict[str, Any]:
    row = {"question_title": "T", "question_content": "Do it.", "starter_code": "", "difficulty": "easy"}
    return {**row, "public_test_cases": json.dumps(tests), "private_test_cases": private, "metadata": "{}", **other}


def test_every_shape_of_the_settings_has_a_function() -> None:
    assert tuple(program_rows.SHAPES) == SHAPES


def test_questions_and_answers_of_each_shape(tmp_path: Path) -> None:
    long = "Wer gewann 1998, und gegen wen spielte er zuletzt? Überlege." * 3
    encrypted = {"problem": hidden(long, "canary x"), "answer": hidden("Čapek", "canary x"), "canary": "canary x"}
    walker = {"question": "When?", "answer": "May 2", "root_url": "https://x.org/", "info": {"hop": "multi-source"}}
    for shape, row, found in (
        ("gaia", gaia(1), ("Question 1?", "17", "rows_level2")),
        ("browsecomp", encrypted, (long, "Čapek", "rows")),
        ("hle", {"question": "Q?", "image": "", "answer": "B", "answer_type": "multipleChoice"}, ("Q?", "B", "rows")),
        ("webwalker", walker, ("When?\n\nWebsite: https://x.org/", "May 2", "rows")),
    ):
        path = write(tmp_path / "rows.jsonl", row)
        (read,) = read_rows(path, Rows(shape=shape))
        assert (read.prompt, read.label, read.subset) == found
        source = SearchQASource("searchqa", data=SearchData(shape=shape, heldout=[path], corpus="none.jsonl"))
        (task,) = of_source(source).problems("heldout")
        assert json.loads(task.problem)["golds"] == [found[1]]


def code_tasks(folder: Path) -> tuple[Any, Any, Any, str]:
    more = [{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]
    starter = "class Solution:\n    def near(self, of, name):\n        "
    called = code(CALLS, json.dumps(CALLS), starter_code=starter, metadata=json.dumps({"func_name": "near"}))
    files = [
        write(folder / "stdin.jsonl", code(STDIN, packed(json.dumps(more)))),
        write(folder / "calls.jsonl", {**called, "question_content": "Be near."}),
    ]
    task_set = of_source(ToolsSource("code", data=ToolData(shape="livecodebench", heldout=files)))
    return (task_set, *task_set.problems("heldout"), starter)


def test_public_and_private_tests_become_cases(tmp_path: Path) -> None:
    _, first, second, starter = code_tasks(tmp_path)
    assert first.task_id == "code/heldout/stdin_easy/0" and second.task_id == "code/heldout/calls_easy/0"
    cases = [(case["stdin"], case["expected"]) for case in json.loads(first.problem)["cases"]]
    assert cases == [("1 2\n", "3\n"), ("5 6\n", "11\n")]
    called = json.loads(second.problem)
    assert [case["value"] for case in called["cases"]] == ["Solution().near([1, 2], 'a')"] * 2
    assert starter in called["prompt"]


@sandboxed
def test_programs_are_run_against_public_and_private_tests(tmp_path: Path) -> None:
    task_set, first, second, starter = code_tasks(tmp_path)

    def reward(task: Any, program: str) -> float:
        environment = task_set.environment(task)
        asyncio.run(environment.reset())
        action = environment.parse(f"```python\n{program}\n```")
        assert action is not None
        asyncio.run(environment.step(action))
        return environment.outcome()

    assert reward(first, "print(sum(map(int, input().split())))") == 1.0
    assert reward(first, "print(3)") == 0.0  # passes the public test only
    assert reward(second, starter + "return of == [1, 2] and name == 'a'") == 1.0
    assert reward(second, starter + "return 1 > 2") == 0.0


class Opened:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("/tmp/icrl_unpickled", "w")


@pytest.mark.parametrize(
    ("private", "said"),
    [
        (packed(Opened()), "a pickle with GLOBAL|a pickle with STACK_GLOBAL|a pickle with (SHORT_)?BINUNICODE"),
        (packed(["[]"]), "where one text is expected; nothing of it was executed"),
        (packed(b"[]"), "where one text is expected"),
        (base64.b64encode(zlib.compress(b"x" * 300)).decode(), "holds no tests"),
        (base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-6]).decode(), "cut off"),
        (base64.b64encode(b"plain").decode(), "holds no tests"),
        ("%%%", "holds no tests"),
        ('{"a": 1}', "holds no tests"),
        (packed('{"a": 1}'), "is not a list of tests"),
        (packed('[{"input": "1"}]'), "its tests or metadata cannot be read"),
    ],
)
def test_tests_that_are_not_one_text_are_refused(tmp_path: Path, private: str, said: str) -> None:
    path = write(tmp_path / "rows.jsonl", code(STDIN, private))
    with pytest.raises(ConfigError, match=rf"rows.jsonl, line 1: not a row of data.shape=livecodebench: .*({said})"):
        list(read_rows(path, Rows(shape="livecodebench")))
    assert not Path("/tmp/icrl_unpickled").exists()


def test_decompressed_tests_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_shapes, "MAX_TESTS_BYTES", 1 << 20)
    path = write(tmp_path / "rows.jsonl", code(STDIN, packed("[" + " " * (2 << 20) + "]")))
    with pytest.raises(ConfigError, match="over 1 MiB of tests"):
        list(read_rows(path, Rows(shape="livecodebench")))


def test_rows_with_files_and_images_are_refused_or_counted(tmp_path: Path) -> None:
    rows = [gaia(1), gaia(2, file_name="x.png"), gaia(3, **{"Final answer": "?"}), gaia(4, file_name="y.pdf"), gaia(5)]
    path = write(tmp_path / "metadata.jsonl", *rows)
    remedy = r"delete the row, or give 'tasks.sources\[...\].data.unusable=drop'"
    with pytest.raises(ConfigError, match=f"metadata.jsonl, line 2: it needs an attached file; {remedy}"):
        list(read_rows(path, Rows(shape="gaia")))
    data = SearchData(shape="gaia", unusable="drop", heldout=[path], corpus="none.jsonl")
    assert [row.number for row in read_rows(path, data)] == [1, 5]
    assert left_out("heldout", data) == {"it needs an attached file": 2, "its answer is hidden": 1}
    tasks = of_source(SearchQASource("searchqa", data=data)).problems("heldout")
    assert [task.task_id for task in tasks] == [f"searchqa/heldout/metadata_level2/{i}" for i in range(2)]
    image = write(tmp_path / "hle.jsonl", {"question": "Q?", "image": "data:image/png;base64,AA", "answer": "B"})
    with pytest.raises(ConfigError, match="it needs an image"):
        list(read_rows(image, Rows(shape="hle")))


def test_other_rows_and_columns_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "Q?", "label": "A"})
    for shape in SHAPES:
        with pytest.raises(ConfigError, match=f"line 1: not a row of data.shape={shape}: no column .*prompt, label"):
            list(read_rows(path, Rows(shape=shape)))
    with pytest.raises(ConfigError, match=r"have no effect with data.shape=gaia: leave them out"):
        list(read_rows(path, Rows(shape="gaia", prompt_column="q")))
    wrong = write(tmp_path / "b.jsonl", {"problem": hidden("é" * 30, "a"), "answer": hidden("é", "a"), "canary": "b"})
    with pytest.raises(ConfigError, match="column 'problem' is not encrypted with the row's canary"):
        list(read_rows(wrong, Rows(shape="browsecomp")))
