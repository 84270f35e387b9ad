"""Columns, prompts and labels of rows as users have them; folders of published datasets; repeated rows; subsets."""

from __future__ import annotations

import datetime
import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole_runs import icrl

from icrl_megatron.settings.task_sections import Rows, ToolData
from icrl_megatron.tasks.dataset_files import files_of, subset_names
from icrl_megatron.tasks.datasets import DataRow, check_no_leak, left_out, read_rows, read_tasks, recognized, subset_of
from icrl_megatron.utils.errors import ConfigError


def jsonl(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(data: Rows) -> list[tuple[str, str]]:
    return [(row.prompt, row.label) for row in read_rows(data.train[0], data)]


ASKED = [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    ("row", "described"),
    [
        ({"prompt": "2+2?", "label": "4"}, ""),
        ({"prompt": ASKED, "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 0}},
         "prompt = column prompt, label = column reward_model.ground_truth"),
        ({"prompt": ASKED, "reward_model": json.dumps({"ground_truth": "4"})},
         "prompt = column prompt, label = column reward_model.ground_truth"),
        ({"prompt": "2+2?", "extra_info": {"answer": 4}}, "prompt = column prompt, label = column extra_info.answer"),
        ({"prompt": ASKED, "answer": "4"}, "prompt = column prompt, label = column answer"),
        ({"prompt": "2+2?", "solution": "4"}, "prompt = column prompt, label = column solution"),
        ({"problem": "2+2?", "solution": "long", "answer": "4", "level": 2},
         "prompt = column problem, label = column answer"),
        ({"question": "2+2?", "final_answer": 4.0}, "prompt = column question, label = column final_answer"),
        ({"instruction": "2+2?", "output": "4"}, "prompt = column instruction, label = column output"),
        ({"instruction": "2+2?", "input": "", "output": "4"},
         "prompt = columns instruction and input, label = column output"),
        ({"prompt": ASKED, "completion": [{"role": "assistant", "content": "4"}]},
         "prompt = column prompt, label = column completion"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "4"}]},
         "prompt = column messages, label = its last assistant message"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "I think 4"}], "answer": "4"},
         "prompt = column messages, label = column answer"),
        ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
         "prompt = column conversations, label = its last assistant message"),
    ],
)  # fmt: skip
def test_columns_are_recognized(row: dict[str, Any], described: str, tmp_path: Path) -> None:
    data = ToolData(train=[jsonl(tmp_path / "rows.jsonl", row)])
    assert read(data) == [("2+2?", "4")]
    assert recognized("train", data) == ([f"{tmp_path / 'rows.jsonl'}: {described}"] if described else [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a?", "problem": "b?", "answer": "4"}, "problem, question may each be the prompt"),
        ({"question": "a?", "answer": "4", "final_answer": "5"}, "answer, final_answer may each be the label"),
        ({"text": "a?", "answer": "4"}, "no column is known as the prompt; the columns are text, answer"),
        ({"prompt": "a?", "score": 1}, "no column is known as the label"),
        ({}, "the columns are none"),
    ],
)
def test_columns_that_cannot_be_told_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, line 1: .*{message}.*'tasks\.sources\[\.\.\.\]\.data\."):
        read(ToolData(train=[jsonl(tmp_path / "rows.jsonl", row)]))


def test_columns_are_dotted_paths_and_may_differ_in_heldout_rows(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", {"a": {"b": {"c": "x?"}}, "d.e": "1", "d": {"e": "2"}})
    heldout = jsonl(tmp_path / "held.jsonl", {"q": "y?", "meta": {"gold": 3}})
    data = ToolData([train], [heldout], prompt_column="a.b.c", label_column="d.e")
    assert read(data) == [("x?", "1")]  # a column's own name comes before a path
    there = r"no column 'a\.b\.c', there are q, meta, meta\.gold.*heldout_prompt_column=COLUMN"
    with pytest.raises(ConfigError, match=there):
        list(read_rows(heldout, data, "heldout"))
    data.heldout_prompt_column, data.heldout_label_column = "q", "meta.gold"
    assert [(row.prompt, row.label) for row in read_rows(heldout, data, "heldout")] == [("y?", "3")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("2+2?", "2+2?"),
        (ASKED, "2+2?"),
        (json.dumps(ASKED), "2+2?"),
        ([{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}], "2+2?"),
        ([{"from": "human", "value": "2+2?"}], "2+2?"),
        ([*ASKED, {"role": "user", "content": "Quick."}], "2+2?\n\nQuick."),
        ("[1, 2] has which sum?", "[1, 2] has which sum?"),
        ('{"a": 1}: how many keys?', '{"a": 1}: how many keys?'),
        ('{"text": "a"}: how many keys?', '{"text": "a"}: how many keys?'),
        ("b'4' is what in Python?", "b'4' is what in Python?"),
    ],
)
def test_prompts_are_text_or_messages(prompt: object, expected: str, tmp_path: Path) -> None:
    assert read(ToolData(train=[jsonl(tmp_path / "rows.jsonl", {"prompt": prompt, "label": "4"})])) == [(expected, "4")]


def system(text: str, role: str = "system") -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([system("Add.")], "Add."),
        ([system(" Add.\n"), system("Be brief.")], "Add.\n\n\nBe brief."),
        ([system("Add.", "developer")], "Add."),
        ([{"from": "system", "value": "Add."}], "Add."),
        ([{"role": "system", "content": [{"type": "text", "text": "Ad"}, {"type": "text", "text": "d."}]}], "Add."),
        ([system(" ")], ""),
    ],
)
def test_system_messages_stay_apart_unless_they_are_joined(messages: list[Any], said: str, tmp_path: Path) -> None:
    for prompt in ([*messages, *ASKED], json.dumps([*messages, *ASKED])):
        data = ToolData(train=[jsonl(tmp_path / "rows.jsonl", {"prompt": prompt, "label": "4"})])
        (row,) = read_rows(data.train[0], data)
        assert (row.prompt, row.system) == ("2+2?", said)
        problem = json.loads(row.problem(label="4"))
        assert ("system" in problem) == bool(said) and list(problem)[0 :: len(problem) - 1] == ["prompt", "where"]
        data.system = "join"
        (joined,) = read_rows(data.train[0], data)
        assert joined.system == "" and joined.prompt.strip() == row.content()


def test_a_late_system_message_is_refused_and_can_be_joined(tmp_path: Path) -> None:
    data = ToolData(train=[jsonl(tmp_path / "rows.jsonl", {"prompt": [*ASKED, system("Add.")], "label": "4"})])
    with pytest.raises(ConfigError, match=r"line 1: column 'prompt' has a system message after a user message.*=join"):
        read(data)
    data.system = "join"
    assert read(data) == [("2+2?\n\nAdd.", "4")]
    data.shape = "hle"
    with pytest.raises(ConfigError, match=r"data\.system have no effect with data\.shape=hle"):
        read(data)


def test_rows_are_the_same_only_with_the_same_system_message(tmp_path: Path) -> None:
    def tasks(name: str, *rows: object) -> list[Any]:
        data = ToolData(train=[jsonl(tmp_path / name, *({"prompt": row, "label": "4"} for row in rows))])
        return read_tasks("math", "train", data, lambda row: row.problem(label=row.label))

    add, more = [system("Add."), *ASKED], [system("More."), *ASKED]
    train = tasks("train.jsonl", ASKED, add, more)
    with pytest.raises(ConfigError, match="2 rows in all repeat"):
        tasks("twice.jsonl", add, add, "Add.\n\n2+2?")
    check_no_leak(train, tasks("other.jsonl", [system("Other."), *ASKED]))
    with pytest.raises(ConfigError, match="1 held-out problems are training problems"):
        check_no_leak(train, tasks("held.jsonl", [system("other."), *ASKED], [system("add."), *ASKED]))


WRITTEN = "data that a program wrote as text"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (True, "is bool"), (12, "is int"), (1.5, "is float"), (None, "is empty"), ("  ", "is empty"),
        ([], "is list"), ({}, "is dict"),
        (["2+2?"], "is list"), ([ASKED], "is list"), ({"role": "user", "content": "2+2?"}, "is dict"),
        ([{"role": "user", "content": None}], "whose content is None"),
        ([{"role": "user", "content": [["a"]]}], "parts of type list"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "whose text is none"),
        (str(ASKED), WRITTEN), (str(tuple(ASKED)), WRITTEN), (str(b"2+2?"), WRITTEN), (str(["2+2?"]), WRITTEN),
        (json.dumps(["2+2?"]), WRITTEN), (json.dumps(ASKED[0]), WRITTEN), (json.dumps({"messages": ASKED}), WRITTEN),
        (json.dumps(ASKED)[:-2], WRITTEN), (json.dumps([{"role": "user", "text": "2+2?"}]), WRITTEN),
        (f"array({ASKED}, dtype=object)", WRITTEN), ("Message(role='user', content='2+2?')", WRITTEN),
        ([{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "?"}]}], "type image_url"),
        ([{"role": "tool", "content": "x"}, *ASKED], "messages of tool"),
        ([*ASKED, {"role": "assistant", "content": "4"}], "of assistant"),
        ([{"role": "system", "content": "2+2?"}], "no user message"),
        ([{"role": "user", "content": 5}], "whose content is 5"),
        ([{"role": "system", "content": "2+2?"}, {"role": "user", "content": ""}], "is empty"),
    ],
)  # fmt: skip
def test_anything_else_is_no_prompt(prompt: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"line 1: column 'prompt'.*{message}"):
        read(ToolData(train=[jsonl(tmp_path / "rows.jsonl", {"prompt": prompt, "label": "4"})]))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([b"4"]), "4"), (pa.array([0.1], pa.float32()), "0.1"), (pa.array([0.1]), "0.1"),
        (pa.array([1.5e-5]), "1.5e-05"),
        (pa.array([1e22]), "10000000000000000000000"), (pa.array([Decimal("2.50")]), "2.5"), (pa.array([7]), "7"),
        (pa.array([datetime.date(2024, 5, 1)]), "2024-05-01"), (pa.array([["7", "-7"]]), '["7", "-7"]'),
        (pa.array([[7]]), '["7"]'),
        (pa.array(["a"]).dictionary_encode(), "a"), (pa.array([True]), "True"),
        (pa.array([1 / 3]), "0.3333333333333333"),
    ],
)  # fmt: skip
def test_labels_of_parquet_columns_are_exact(column: pa.Array, expected: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["q?"], "label": column}), tmp_path / "rows.parquet")
    assert read(ToolData(train=[str(tmp_path / "rows.parquet")])) == [("q?", expected)]


def test_the_input_of_an_instruction_is_a_part_of_the_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": given, "output": "4"} for given in ("2, 2", "")]
    assert read(ToolData(train=[jsonl(tmp_path / "rows.jsonl", *rows)])) == [("Add.\n\n2, 2", "4"), ("Add.", "4")]


@pytest.mark.parametrize(
    ("label", "message"),
    [("b'4'", "Python's notation"), ("['4']", "Python's notation"), ("['4', '5']", "Python's notation")],
)
def test_python_notation_is_no_label(label: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"line 1: column 'label' .*{message}"):
        read(ToolData(train=[jsonl(tmp_path / "rows.jsonl", {"prompt": "2+2?", "label": label})]))


def test_bytes_are_no_prompt_and_other_bytes_no_label(tmp_path: Path) -> None:
    for prompt, label, message in (
        (b"q?", b"4", "'prompt' is bytes"),
        ("q?", b"\xff", "not UTF-8"),
        ("q?", float("nan"), "NaN"),
    ):
        pq.write_table(pa.table({"prompt": [prompt], "label": [label]}), tmp_path / "rows.parquet")
        with pytest.raises(ConfigError, match=message):
            read(ToolData(train=[str(tmp_path / "rows.parquet")]))


def test_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.parquet", "rows.arrow"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
        with pytest.raises(ConfigError, match=r"a Git LFS pointer, not the data; run `git lfs pull`"):
            read(ToolData(train=[str(tmp_path / name)]))


def test_a_byte_order_mark_and_other_line_ends_do_no_harm(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b\x85c?", "label": "1"}, {"prompt": "d?", "label": "2"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(ToolData(train=[str(tmp_path / "rows.jsonl")])) == [("a\u2028b\x85c?", "1"), ("d?", "2")]


ROW = {"prompt": "q?", "label": "1"}


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-00000-of-00001.parquet"], "train", 2),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "heldout", 1),
        (["train.jsonl", "validation.jsonl"], "heldout", 1),
        (["train.jsonl", "test.jsonl", "validation.jsonl"], "heldout", 1),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", 2), (["a.jsonl", "b.jsonl"], "train", 2),
        (["a.jsonl", "b.jsonl"], "heldout", 2), (["trainer.jsonl", "testing.jsonl"], "train", 2),
        (["test.jsonl"], "train", "no files of the train split, only test"), (["train.jsonl"], "heldout", "only train"),
        (["train.jsonl", "more.jsonl"], "train", "1 are not, the first .*more"),
        (["main/train-0.parquet", "socratic/train-0.parquet"], "train", "several folders; name one of .*main, "),
    ],
)  # fmt: skip
def test_published_folders_keep_their_splits(files: list[str], split: Any, expected: int | str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            files_of(str(tmp_path), split=split)
    else:
        assert len(files_of(str(tmp_path), split=split)) == expected


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a/x.jsonl", "b/y.jsonl"], ["x", "y"]),
        (["easy/data/test-0.parquet", "hard/data/test-0.parquet"], ["easy", "hard"]),
        (["easy/data/*", "hard/data/*"], ["easy", "hard"]), (["easy/data", "hard/data"], ["easy", "hard"]),
        (["m/easy/t.jsonl", "m/hard/t.jsonl", "z.jsonl"], ["easy", "hard", "z"]),
        (["t.jsonl", "a/t.jsonl"], ["t_0", "a"]),
        (["a/t.jsonl", "a/t.parquet"], ["t_0", "t_1"]),
    ],
)  # fmt: skip
def test_entries_with_the_same_name_stay_apart(given: list[str], names: list[str]) -> None:
    assert subset_names(given) == names


def problem(row: DataRow) -> str:
    return row.prompt


def test_subsets_within_a_file(tmp_path: Path) -> None:
    sets = ("AIME 24", "MATH", "AIME 24")
    rows = [{"prompt": f"{i}?", "label": i, "meta": {"set": name}} for i, name in enumerate(sets)]
    data = ToolData(heldout=[jsonl(tmp_path / "test.jsonl", *rows)], subset_column="meta.set")
    tasks = read_tasks("math", "heldout", data, problem)
    found = [task.task_id for task in tasks]
    assert found == ["math/heldout/test_AIME_24/0", "math/heldout/test_MATH/0", "math/heldout/test_AIME_24/1"]
    assert {subset_of(task) for task in tasks} == {"math/test_AIME_24", "math/test_MATH"}
    data.subset_column = "set"
    with pytest.raises(ConfigError, match=r"test\.jsonl, line 1: no text in column 'set'.*meta\.set"):
        read_tasks("math", "heldout", data, problem)


def test_repeated_rows_are_counted_in_one_message_or_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i % 5} squared?", "label": (i % 5) ** 2} for i in range(500)]
    data = ToolData(train=[jsonl(tmp_path / "rows.jsonl", *rows)])
    with pytest.raises(ConfigError, match=r"line 6: the same prompt as .*line 1, and 495 rows in all.*duplicates=drop"):
        read_tasks("math", "train", data, problem)
    data.duplicates = "drop"
    assert len(read_tasks("math", "train", data, problem)) == 5
    assert dict(left_out("train", data)) == {"it repeats the prompt of an earlier row": 495}


def test_a_dry_run_says_which_columns_were_recognized(tmp_path: Path) -> None:
    verl = {"prompt": ASKED, "reward_model": {"ground_truth": "4"}}
    train = jsonl(tmp_path / "train.jsonl", verl)
    heldout = jsonl(tmp_path / "held.jsonl", {"question": "3+3?", "answer": "6"})
    sources = f"tasks.sources=[{{name: math, data: {{train: ['{train}'], heldout: ['{heldout}']}}}}]"
    code, _, err = icrl("train", "rulebook_easy", sources, f"run_dir={tmp_path / 'run'}", "--dry-run")
    assert code == 0, err
    assert f"note: {train}: prompt = column prompt, label = column reward_model.ground_truth; tasks.sources.0." in err
    assert f"note: {heldout}: prompt = column question, label = column answer; tasks.sources.0.data.heldout_" in err
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
