"""Tests of programs in the forms in which sets are published, each with a right and a wrong program in the sandbox."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from icrl_megatron.settings.task_sections import ToolData
from icrl_megatron.tasks.datasets import DataRow, read_rows, recognized
from icrl_megatron.tasks.program_labels import Case, program_problem
from icrl_megatron.tasks.programs import judged
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.sandbox import Sandbox, SandboxLimits

needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap: make system-packages")

MUL = "def mul(a, b):\n    return a * b\n"
METHOD = "class Solution:\n    def mul(self, a: int, b: int) -> int:\n        return a * b\n"
HALVES = "def parts(text: str) -> List[str]:\n    half = len(text) // 2\n    return text[:half], text[half:]\n"
READS = "a, b = map(int, input().split())\nprint(a * b)\n"
CHECK = (
    "METADATA = {'author': 'x'}\n"
    "\n"
    "def check(candidate):\n"
    "    assert candidate(2, 3) == 6\n"
    "    assert candidate(0, 9) == 0\n"
)
LOOP = "def check(candidate):\n    for a in range(4):\n        assert candidate(a, 5) == 5 * a\n"
PYTEST = (
    "from solution import mul\n"
    "\n"
    "def test_small():\n"
    "    assert mul(2, 3) == 6\n"
    "\n"
    "def test_zero():\n"
    "    assert mul(0, 7) == 0\n"
)

LABELS: list[tuple[str, Any, str, str]] = [
    ("stdin", {"inputs": ["2 3\n"], "outputs": ["6\n"]}, READS, "print(5)"),
    ("numbers as outputs", {"inputs": ["2 3"], "outputs": [6]}, READS, "print(5)"),
    ("lines in lists", {"inputs": [["2 3"]], "outputs": [["6"]]}, READS, "print(5)"),
    ("JSON in text", json.dumps({"inputs": ["2 3"], "outputs": ["6"]}), READS, "print(5)"),
    ("no function name", {"fn_name": None, "inputs": ["2 3"], "outputs": ["6"]}, READS, "print(5)"),
    ("typed stdin", [{"input": "2 3", "output": "6", "testtype": "stdin"}], READS, "print(5)"),
    ("test_cases", {"language": "python", "test_cases": [{"type": "stdin_stdout", "input": "2 3", "output": "6"}]},
     READS, "print(5)"),
    ("function", {"fn_name": "mul", "inputs": [[2, 3], [4, 5]], "outputs": [6, 20]}, MUL, MUL.replace("*", "+")),
    ("method", {"fn_name": "mul", "inputs": [[2, 3]], "outputs": [6]}, METHOD, METHOD.replace("*", "+")),
    ("wrapped output", {"fn_name": "mul", "inputs": [[2, 3]], "outputs": [[6]]}, METHOD, METHOD.replace("*", "-")),
    ("tuples for lists", {"fn_name": "parts", "inputs": [["abcd"]], "outputs": [["ab", "cd"]]}, HALVES,
     HALVES.replace("// 2", "// 4")),
    ("arguments as text", {"entry_point": "mul", "inputs": ["2\n3"], "outputs": ["6"]}, MUL, MUL.replace("*", "-")),
    ("functional", {"fn_name": "mul", "test_cases": [{"input": "2\n3", "output": "6", "testtype": "functional"}]},
     METHOD, METHOD.replace("*", "-")),
    ("check", {"test": CHECK, "entry_point": "mul"}, MUL, MUL.replace("*", "+")),
    ("check with a loop", {"test": LOOP, "entry_point": "mul"}, MUL, "def mul(a, b):\n    return 5 * min(a, 2)\n"),
    ("check with a call", f"{CHECK}\ncheck(mul)\n", MUL, MUL.replace("*", "-")),
    ("pytest functions", PYTEST, MUL, "def mul(a, b):\n    return a * b or 1\n"),
    ("asserts", ["assert mul(2, 3) == 6", "import math\nassert math.isclose(mul(0.5, 3), 1.5)"], MUL,
     "def mul(a, b): return 6"),
    ("annotations without imports", ["assert tuple(parts('abcd')) == ('ab', 'cd')"], HALVES,
     HALVES.replace("// 2", "// 4")),
]  # fmt: skip


def cases(label: Any) -> list[Case]:
    text = label if isinstance(label, str) else json.dumps(label)
    problem = json.loads(program_problem(DataRow(Path("rows.jsonl"), 1, "rows", "Do it.", text)))
    return [Case(**case) for case in problem["cases"]]


@needs_sandbox
@pytest.mark.parametrize(("label", "right", "wrong"), [one[1:] for one in LABELS], ids=[one[0] for one in LABELS])
def test_published_tests_accept_the_right_program_only(label: Any, right: str, wrong: str) -> None:
    sandbox = Sandbox(SandboxLimits(5.0, 512 << 20))
    verdict = judged(right, cases(label), sandbox, 0.0)
    assert verdict.right, verdict.remark
    assert not judged(wrong, cases(label), sandbox, 0.0).right


def test_expected_values_of_straight_tests_stay_outside_the_sandbox() -> None:
    for label in (
        {"test": CHECK, "entry_point": "mul"},
        PYTEST,
        {"fn_name": "mul", "inputs": [[2, 3]], "outputs": [6]},
    ):
        for case in cases(label):
            assert case.value.startswith(("candidate(", "mul(", "_as_lists(")) and case.expected.startswith('["number"')
            assert "== 6" not in case.setup and "== 0" not in case.setup


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([{"input": "2", "output": "4", "testtype": "functional"}], "tests of a function without its name"),
        ({"language": "python", "type": "function_call", "inputs": ["2"], "outputs": ["4"], "fn_name": ""},
         "without its name"),
        ({"language": "cpp", "test_cases": [{"input": "2", "output": "4"}]}, "tests in 'cpp', not Python"),
        ({"fn_name": "a b", "inputs": [[2]], "outputs": [4]}, "is not the name of a function"),
        (CHECK, "without entry_point or a call"),
        ("import pytest\n\ndef test_a():\n    assert pytest.approx(1) == f()\n", "pytest"),
        ({"inputs": ["1"], "outputs": []}, "lists of the same length"), ([], "an empty list"), ("x = 1", "no assert"),
        ({"inputs": ["1"], "outputs": [None]}, "which is not text"), ("def f(:", "invalid syntax"),
    ],
)  # fmt: skip
def test_tests_that_cannot_be_run_are_refused(label: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, line 1: the label holds no test cases \(.*{message}"):
        cases(label)


ROWS: dict[str, dict[str, Any]] = {
    "humaneval": {"task_id": "x/0", "prompt": "def mul(a, b):\n    ...", "entry_point": "mul", "test": CHECK,
                  "canonical_solution": "return a * b"},
    "mbpp": {"task_id": 1, "text": "Multiply.", "code": MUL, "test_list": ["assert mul(2, 3) == 6"],
             "test_setup_code": "", "challenge_test_list": []},
    "apps": {"question": "Multiply.", "solutions": "[]", "difficulty": "easy", "starter_code": "",
             "input_output": json.dumps({"fn_name": "mul", "inputs": [[2, 3]], "outputs": [6]})},
    "kodcode": {"question": "Multiply.", "solution": MUL, "test": PYTEST,
                "test_info": [{"function_name": "mul", "function_declaration": "def mul(a, b):"}]},
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("shape", ROWS)
def test_rows_of_published_sets_are_recognized_and_run(shape: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[shape]) + "\n")
    for given in ("", shape):
        data = ToolData(train=[str(path)], shape=given)
        (row,) = read_rows(str(path), data)
        found = [Case(**case) for case in json.loads(program_problem(row))["cases"]]
        sandbox = Sandbox(SandboxLimits(5.0, 512 << 20))
        assert judged(MUL, found, sandbox, 0.0).right
        assert not judged("def mul(a, b): return 7", found, sandbox, 0.0).right
    assert recognized("train", ToolData(train=[str(path)])) == [f"{path}: rows of {shape}"]
