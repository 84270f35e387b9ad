"""`icrl data`: the sets of ICRL's paper, from small files that we wrote in the columns in which they are published."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import Done, python

from icrl_megatron.settings.task_options import DataSource, MathSource, SearchQASource, ServedSource
from icrl_megatron.settings.task_sections import SearchData, ServerData, ToolData
from icrl_megatron.tasks import published, published_files, registry
from icrl_megatron.tasks.agentgym import AgentGym
from icrl_megatron.tasks.datasets import subset_of
from icrl_megatron.tasks.mathematics import Mathematics
from icrl_megatron.tasks.published import MATH_TESTS, SETS
from icrl_megatron.utils.errors import ConfigError
from icrl_recipes import registry as recipes

ID_SETS = ("alfworld", "sciworld", "webshop")
COUNTS = {"alfworld": (2420, 200), "sciworld": (2120, 200), "webshop": (3930, 200)}
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": f"What is 2 + 3?\n{published.ASK_FOR_BOX}"},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "openr1_math_4k": [
        {
            "data_source": "openr1",
            "prompt": MESSAGES,
            "ability": "math",
            "reward_model": {"ground_truth": "5", "style": "rule"},
            "extra_info": {"index": 0, "split": "default"},
        }
    ],
    "math500": [
        {
            "problem": "What is $2 + 3$?",
            "solution": "It is $\\boxed{5}$.",
            "answer": "5",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/algebra/1.json",
        }
    ],
    "minerva": [{"question": "How far does light go in 1 s, in m?", "answer": "3.0e8"}],
    "olympiadbench": [
        {
            "id": 1,
            "question": "Solve $x^2 = 4$.",
            "solution": ["Try both signs."],
            "final_answer": ["$2,-2$"],
            "context": None,
            "modality": "Text-only",
            "is_multiple_answer": True,
            "unit": None,
        }
    ],
    "aime24": [{"id": 60, "problem": "What is $200 + 4$?", "solution": "\\boxed{204}", "url": "https://example.org"}],
    "amc23": [{"id": 0, "question": "What is $30 - 3$?", "answer": "27.0", "url": "https://example.org"}],
}
WRITTEN = {
    "openr1_math_4k": ("What is 2 + 3?", "5"),
    "math500": ("What is $2 + 3$?", "5"),
    "minerva": ("How far does light go in 1 s, in m?", "3.0e8"),
    "olympiadbench": ("Solve $x^2 = 4$.", "$2,-2$"),
    "aime24": ("What is $200 + 4$?", "204"),
    "amc23": ("What is $30 - 3$?", "27.0"),
}
FILES = {
    "openr1_math_4k": "openr1_math_4k_train_qwenformat/train.parquet",
    "math500": "test.jsonl",
    "minerva": "test.jsonl",
    "olympiadbench": "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
    "aime24": "test-00000-of-00001.parquet",
    "amc23": "test-00000-of-00001.parquet",
}


pytestmark = pytest.mark.usefixtures("own_folder")


def copy(name: str, rows: list[dict[str, Any]], file: str = "") -> Path:
    """A local copy of a set's repository, where its command would put it."""
    path = SETS[name].source.folder / (file or FILES[name])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=4))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of_size(monkeypatch: pytest.MonkeyPatch, name: str, rows: int, **changes: Any) -> None:
    monkeypatch.setitem(SETS, name, replace(SETS[name], rows=rows, **changes))


def write(name: str, source: Path | None = None, overwrite: bool = False) -> published_files.Written:
    (written,) = published_files.write([name], source, published.WRITTEN, overwrite)
    return written


def icrl(*arguments: str, cwd: Path) -> Done:
    return python("-c", "from icrl_megatron.cli import main; main()", *arguments, cwd=cwd)


@pytest.mark.parametrize("task", ID_SETS)
def test_lists_of_ids_have_the_counts_of_the_paper_and_are_played(task: str) -> None:
    train, test = COUNTS[task]
    for split, folder, ids in (("train", "train", range(train)), ("test", "eval", range(train, train + test))):
        name = f"{task}_{split}"
        copy(name, [{"item_id": f"{task}_{i}"} for i in reversed(ids)], f"{folder}/{name}.json")
        written = write(name)
        assert (written.rows, written.left_out) == (len(ids), ())
        assert written.sha256 == hashlib.sha256(written.file.read_bytes()).hexdigest()
    data = ServerData(train=[f"data/{task}_train.jsonl"], heldout=[f"data/{task}_test.jsonl"], servers=["http://h:1"])
    task_set = AgentGym(ServedSource(task, data=data))
    played = [json.loads(one.problem)["task"] for one in task_set.problems("heldout")]
    assert played == [*reversed(range(train, train + test))]
    assert len(task_set.problems("train")) == train


def test_the_references_own_list_has_the_same_result(tmp_path: Path) -> None:
    copy("webshop_test", [{"item_id": f"webshop_{i}"} for i in range(200)], "eval/webshop_test.json")
    first = write("webshop_test")
    own = tmp_path / "webshop_test.jsonl"
    rows = ({"task_id": str(i), "metadata": {"data_source": "webshop", "subset": "webshop"}} for i in range(200))
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = write("webshop_test", own, overwrite=True)
    assert again.sha256 == first.sha256 and again.source == own


def test_questions_keep_the_data_set_that_they_come_from_as_subset() -> None:
    ids = [ids.start + i for ids in published.SEARCHQA_SUBSETS.values() for i in range(60)][:400]
    named = {i: name for name, ids in published.SEARCHQA_SUBSETS.items() for i in ids}
    copy("searchqa_test", [{"item_id": f"{named[i]}_{i}"} for i in ids], "eval/searchqa_test.json")
    written = write("searchqa_test")
    assert written.subsets == dict(Counter(named[i] for i in ids)) and set(written.subsets) >= {"musique", "bamboogle"}
    assert "40 of bamboogle" in written.described()
    data = SearchData(train=["51713:51720"], heldout=["data/searchqa_test.jsonl"], servers=["http://h:1"])
    task_set = registry.of_source(SearchQASource("searchqa", data=data))
    subsets = Counter(subset_of(task) for task in task_set.problems("heldout"))
    assert subsets == {f"searchqa/searchqa_test_{name}": count for name, count in written.subsets.items()}


def test_subsets_are_agentgyms_ranges() -> None:
    ranges = [*published.SEARCHQA_SUBSETS.values(), *published.SEARCHQA_TRAIN.values()]
    assert [one.stop for one in ranges[:-1]] == [one.start for one in ranges[1:]]
    assert SETS["searchqa_train"].ids == range(ranges[-2].start, ranges[-1].stop)
    assert SETS["searchqa_train"].rows == sum(map(len, published.SEARCHQA_TRAIN.values()))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"item_id": "musique_51588"}, "task 51588 is of bamboogle on AgentGym's server, and the row says 'musique'"),
        ({"task_id": 3, "metadata": {"subset": "popqa"}}, "task 3 is of nq .* says 'popqa'"),
        ({"item_id": "nq_51713"}, "task 51713 is not in 0:3610, "),
        ({"item_id": "webshop_3"}, "the id 'webshop_3' is neither a number nor searchqa_NUMBER"),
        ({"item_id": "nq_-3"}, "neither a number"),
        ({"index": 3}, "row 1: no column item_id or task_id; there are index; name the file of AgentGym/"),
    ],
)
def test_a_wrong_id_is_refused(row: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_size(monkeypatch, "searchqa_test", 1)
    copy("searchqa_test", [row], "eval/searchqa_test.json")
    with pytest.raises(ConfigError, match=message):
        write("searchqa_test")
    assert not Path("data").exists()


@pytest.mark.parametrize("name", ROWS)
def test_mathematics_is_written_as_prompts_and_gradable_labels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = copy(name, ROWS[name])
    of_size(monkeypatch, name, 1, blob=published_files._git_blob(file) if SETS[name].blob else "")
    written = write(name)
    row = dict(zip(("prompt", "label"), WRITTEN[name], strict=True))
    assert [json.loads(line) for line in written.file.read_text().splitlines()] == [row]
    Path("other.jsonl").write_text('{"prompt": "What is 1 + 1?", "label": "2"}\n')
    data = ToolData(train=[str(written.file)], heldout=["other.jsonl"])
    Mathematics(MathSource("math", data=data)).check()


def test_a_label_that_no_reply_could_match_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    of_size(monkeypatch, "minerva", 3)
    copy("minerva", [{"question": f"Question {i}?", "answer": label} for i, label in enumerate(("1", "$t(0,4]$", "x"))])
    written = write("minerva")
    assert (written.rows, written.left_out) == (2, (2,))
    assert "left out, because no reply to them could be graded as right: 1 rows (2)" in written.described()


def test_another_file_than_the_published_one_is_refused() -> None:
    file = copy("openr1_math_4k", ROWS["openr1_math_4k"])
    with pytest.raises(ConfigError, match=r"its git id is [0-9a-f]{40}, and zhangxy-2019/critique-GRPO has 370215d7"):
        write("openr1_math_4k")
    assert published_files._git_blob(file) != SETS["openr1_math_4k"].blob


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("math500", ROWS["math500"], "1 rows, and the published set has 500; get it again: hf download HuggingFaceH4"),
        ("amc23", [{"problem": "What?", "answer": "1"}], r"row 1: no column question; there are problem, answer"),
        ("aime24", [{"problem": "What?", "solution": "It is 5."}], r"its solution 'It is 5\.' has no \\boxed answer"),
        ("olympiadbench", [{"question": "What?", "final_answer": "2"}], "final_answer is '2', where a list"),
        ("minerva", [{"question": " ", "answer": "1"}], "column 'question' is empty"),
    ],
)
def test_other_rows_than_the_published_ones_are_refused(name: str, rows: list[dict[str, Any]], message: str) -> None:
    copy(name, rows)
    with pytest.raises(ConfigError, match=message):
        write(name)
    assert not Path("data").exists()


def test_ids_outside_the_published_range_and_repeated_ids_are_refused() -> None:
    ids = [f"alfworld_{i}" for i in range(2420, 2620)]
    for wrong, message in (("alfworld_7", "task 7 is in it, .* has 2420 to 2619"), (ids[1], "task 2421 .* several")):
        copy("alfworld_test", [{"item_id": one} for one in [wrong, *ids[1:]]], "eval/alfworld_test.json")
        with pytest.raises(ConfigError, match=message):
            write("alfworld_test")


def test_a_file_that_is_there_is_replaced_only_if_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    of_size(monkeypatch, "math500", 1)
    copy("math500", ROWS["math500"])
    target = Path("data/math500.jsonl")
    target.parent.mkdir()
    target.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"data/math500\.jsonl: is there already; give --overwrite"):
        write("math500")
    assert target.read_text() == "mine\n"
    assert write("math500", overwrite=True).rows == 1 and "mine" not in target.read_text()
    target.unlink()
    target.symlink_to("elsewhere.jsonl")
    with pytest.raises(ConfigError, match="symbolic link"):
        write("math500", overwrite=True)


def test_nothing_is_written_if_one_of_several_sets_cannot_be() -> None:
    copy("aime24", ROWS["aime24"] * 30)
    with pytest.raises(ConfigError, match="no such folder; amc23 is in https://huggingface"):
        list(published_files.write(["aime24", "amc23"], None, published.WRITTEN))
    assert not Path("data").exists()
    with pytest.raises(ConfigError, match="of several repositories"):
        list(published_files.write(["aime24", "amc23"], Path("sources"), published.WRITTEN))


def test_several_files_of_one_name_are_refused() -> None:
    for folder in ("eval", "old"):
        copy("webshop_test", [{"item_id": "webshop_1"}], f"{folder}/webshop_test.json")
    copy("webshop_test", [], "eval/webshop_test.json.metadata")  # the Hub's client keeps such files beside its own
    with pytest.raises(ConfigError, match=r"2 files in sources/AgentGym-RL-Data-ID match .* --source"):
        write("webshop_test")


def test_a_damaged_list_is_refused() -> None:
    for text, message in (('{"item_id": "webshop_1"}', "not a JSON list of objects"), ("[", "not JSON")):
        copy("webshop_test", [], "eval/webshop_test.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            write("webshop_test")


def test_the_command_lists_writes_and_refuses(tmp_path: Path) -> None:
    listed = icrl("data", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout and one.source.get in listed.stdout for name, one in SETS.items())
    rows = [{"problem": f"What is {i} + 1?", "solution": f"\\boxed{{{i + 1}}}"} for i in range(30)]
    file = copy("aime24", rows)
    done = icrl("data", "aime24", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256((tmp_path / "data/aime24.jsonl").read_bytes()).hexdigest()
    assert f"data/aime24.jsonl: 30 rows, sha256 {digest}" in done.stdout
    assert "license: none stated" in done.stdout and str(file) in done.stdout
    assert "written, sha256" in icrl("data", cwd=tmp_path).stdout
    for words, message in (
        (["aime24"], "is there already"),
        (["aime25"], "aime25: no such set; the sets are alfworld_train, "),
        (
            ["amc23"],
            "`hf download math-ai/amc23 --repo-type dataset --local-dir sources/amc23` copies it (not run here)",
        ),
    ):
        refused = icrl("data", *words, cwd=tmp_path)
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1


def test_recipes_name_what_the_command_writes_and_say_so_when_it_is_missing() -> None:
    named = set()
    for make in recipes().values():
        for source in make().tasks.sources:
            if isinstance(source, DataSource):
                entries = [*source.data.train, *source.data.heldout]
                named |= {one for one in entries if one.startswith("data/")}
    expected = ("webshop_train", "webshop_test", "searchqa_test", "openr1_math_4k", *MATH_TESTS)
    assert named == {published.entry(name) for name in expected}
    math, webshop = [published.entry(one) for one in ("aime24", "webshop_test")]
    for task_set, name in (
        (Mathematics(MathSource("math", data=ToolData(train=[math]))), "aime24"),
        (AgentGym(ServedSource("webshop", data=ServerData(train=[webshop]))), "webshop_test"),
    ):
        with pytest.raises(ConfigError, match=rf"data/{name}\.jsonl: .*; `icrl data {name}` writes it"):
            task_set.problems("train")
