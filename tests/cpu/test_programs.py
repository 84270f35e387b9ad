"""The task set `code`: verdicts, which program of a reply is run, and dataset rows."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sandboxes import LIMITS, sandboxed
from whole_runs import icrl

from icrl_megatron.settings.task_options import ToolsSource
from icrl_megatron.settings.task_sections import ToolData
from icrl_megatron.tasks import programs, registry
from icrl_megatron.tasks.base import Checked
from icrl_megatron.tasks.program_labels import Case, cases_of
from icrl_megatron.tasks.programs import judged, last_program, same_output
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.sandbox import Sandbox
from icrl_megatron.utils.sandbox_guest import encoded


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(LIMITS)


# Verdicts

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert [1, 2] == add([1], [2])"]


def cases(label: object) -> list[Case]:
    return list(cases_of(label if isinstance(label, str) else json.dumps(label)))


@sandboxed
@pytest.mark.parametrize(
    ("program", "tests", "part"),
    [
        (ADD, TESTS, None),
        (ADD.replace("+", "-"), TESTS, "Test 1 of 3 failed. The value was '-1'. It evaluated 'add(1, 2)'"),
        ("def add(a, b): return 3", TESTS, "Test 2 of 3"),
        ("def plus(a, b): return 3", TESTS, "NameError: name 'add' is not defined"),
        ("def add(:", TESTS, "SyntaxError"),
        (ADD, ["import math\nassert math.isclose(add(0.1, 0.2), 0.3)", "assert add(1, 1)"], None),
        (ADD, ["assert add(1, 1) < 2"], "Test 1 of 1"),
        (ADD, ["assert add((), ()) is None"], "Test 1 of 1"),
        (ADD, ["assert add(0, 1) is True"], "The value was \"('int', 1)\""),
        ("def same(a, b): return a == b", ["assert same(1, 1) is True", "assert same(1, 2) is False"], None),
        ("from fractions import Fraction\ndef half(n): return Fraction(n, 2)", ["assert half(4) == 2"], None),
        (f"{ADD}\nif __name__ == '__main__': 1 / 0", TESTS, None),
        ("import os\ndef add(a, b): os._exit(0)", TESTS, "ended before it could be called"),
        ("import sys\nsys.exit(0)", TESTS, "ended before it could be called"),
        (
            "class Yes:\n  def __eq__(s, o): return True\n  __hash__ = None\ndef add(a, b): return Yes()",
            TESTS,
            "Test 1",
        ),
        ("def add(a, b): x = []; x.append(x); return x", TESTS, "RecursionError"),
        ("def add(a, b):\n  while True: pass", TESTS, "Test 1 of 3 failed. The program "),
    ],
)
def test_assert_statements_are_judged(box: Sandbox, program: str, tests: list[str], part: str | None) -> None:
    verdict = judged(program, cases(tests), box, 0.0)
    assert verdict.right is (part is None) and (part or "passes all") in verdict.remark, verdict


@sandboxed
def test_program_cannot_read_the_expected_output(box: Sandbox) -> None:
    """The program searches stack frames, all live objects, open files and its input while it is called."""
    secret = 918273645
    program = (
        "import gc, os, sys\n"
        "def f():\n"
        "  seen = [repr(o)[:100000] for o in gc.get_objects() if isinstance(o, (dict, list, tuple, str))]\n"
        "  frame = sys._getframe()\n"
        "  while frame: seen += [repr(frame.f_code.co_consts), repr(frame.f_locals)]; frame = frame.f_back\n"
        "  for fd in range(64):\n"
        "    try: os.lseek(fd, 0, 0); seen.append(repr(os.read(fd, 1 << 20)))\n"
        "    except OSError: pass\n"
        "  seen += [open(n).read() for n in ('/program.py', '/guest.py')]\n"
        f"  number = {secret - 1} + len('x')\n"
        "  return any(str(number) in s or hex(number) in s for s in seen), len(seen) > 20\n"
    )
    (case,) = cases([f"assert f() == {secret}"])
    assert str(hex(secret)) in case.expected and str(secret) not in case.value
    verdict = judged(program, [case], box, 0.0)
    assert "The value was '(False, True)'" in verdict.remark
    # Programs that print get only their input.
    assert judged("import sys\nprint(sys.stdin.read())", [Case(str(secret), stdin="in")], box, 0.0).right is False


@sandboxed
def test_programs_with_input_and_output_are_judged(box: Sandbox) -> None:
    double = "for line in iter(input, 'end'): print(int(line) * 2)"
    label = {"inputs": ["1\n2\nend\n", ["3", "end"]], "outputs": ["2\n4", "6\n"]}
    assert judged(double, cases(label), box, 0.0).right
    wrong = judged(double, cases([{"input": "5\nend", "output": "11"}]), box, 0.0)
    assert wrong.remark == "Test 1 of 1 failed. The program printed '10\\n'. Its input was '5\\nend'."
    large = "x" * 3_000_000  # more than a pipe buffers
    assert judged("print(len(input()))", [Case("3000000", stdin=large)], box, 0.0).right
    assert judged("print(input())", [Case("y", stdin=large)], box, 0.0).remark.count("x") < 1000
    assert not judged("#" * (programs.MAX_PROGRAM_CHARS + 1), [Case("")], box, 0.0).right


@pytest.mark.parametrize(
    ("given", "expected", "tolerance", "same"),
    [
        ("1 2\n", "1 2", 0.0, True),
        ("1 2 \n\n", "\n1 2", 0.0, True),
        ("1  2", "1 2", 0.0, False),
        ("1\n2", "1 2", 0.0, False),
        ("0.3333", "0.333333", 0.0, False),
        ("x 0.3333", "x 0.333333", 1e-3, True),
        ("y 0.3333", "x 0.333333", 1e-3, False),
        ("1 2", "1", 1e-3, False),
        ("nan", "1", 1e-3, False),
        ("", "", 0.0, True),
    ],
)
def test_output_comparison(given: str, expected: str, tolerance: float, same: bool) -> None:
    assert same_output(given, expected, tolerance) is same


NUMBERS = st.builds(Fraction, st.integers(-4, 4), st.sampled_from([1, 2, 3])) | st.sampled_from(
    [Decimal(text) for text in ("1", "0.5", "2.50", "1e400", "1e-400", "Infinity")] + [float("inf"), 10**400]
)
VALUES = st.recursive(
    NUMBERS
    | st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-3, 3).map(lambda x: round(x * 2) / 2)
    | st.text("ab"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text("ab", max_size=2) | st.integers(0, 2), inner, max_size=3)
        | st.frozensets(st.integers(0, 3) | st.floats(0, 3).map(round), max_size=3)
    ),
    max_leaves=6,
)


@given(VALUES, VALUES)
def test_encodings_are_equal_exactly_if_values_are_equal(left: object, right: object) -> None:
    assert (encoded(left) == encoded(right)) is (left == right)


# Replies


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("So:\n```python\nprint(1)\n```\nDone.", "print(1)"),
        ("```\na\n```\nbetter:\n```py\nb\n\nc\n```", "b\n\nc"),
        ("```python\na\n```\noutput:\n```text\n1\n```", "a"),
        ("```python\na\n```\nand\n```python\nb", "a"),
        ("```python\na\n```python\nb\n```", "b"),
        ("``` python\r\na\r\n```\r\n", "a"),
        ("print(1)", None),
        ("```python\n\n```", None),
        ("", None),
    ],
)
def test_the_last_program_counts(reply: str, program: str | None) -> None:
    assert last_program(reply) == program


@given(st.text(alphabet="`python\n \t\rx"))
def test_last_program_handles_any_text(reply: str) -> None:
    found = last_program(reply)
    assert found is None or (found in reply and found.strip())


# The task set


def dataset(folder: Path, rows: list[dict[str, object]], **data: object) -> ToolsSource:
    for name, content in (("train", rows), ("heldout", [{"prompt": "held?", "label": ["assert True"]}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    paths = {name: [str(folder / f"{name}.jsonl")] for name in ("train", "heldout")}
    return ToolsSource("code", data=ToolData(**paths, **data))  # type: ignore[arg-type]


@sandboxed
async def test_concurrent_answers_are_judged_independently(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "Add.", "label": TESTS}]
    task_set = registry.of_source(dataset(tmp_path, rows, grading_timeout_s=2.0, program_memory_mib=256))
    assert isinstance(task_set, Checked)
    task_set.check()
    task = task_set.problems("train")[0]

    async def attempt(program: str) -> tuple[bool, str]:
        environment = task_set.environment(task)
        assert (await environment.reset()).startswith("Add.\n\n")
        action = environment.parse(f"I think\n```python\n{program}\n```")
        assert action == program and (await environment.step(action)).done
        assert environment.outcome() == float(environment.success())
        return environment.success(), environment.summary()

    programs = (ADD, "while True: pass", ADD, "import os\nos.fork()")
    verdicts = await asyncio.gather(*(attempt(program) for program in programs))
    assert [right for right, _ in verdicts] == [True, False, True, False]
    assert "passes all 3" in verdicts[0][1] and "PermissionError" in verdicts[3][1]


@pytest.mark.parametrize(
    ("label", "part"),
    [
        ([], "label' is empty"),
        ({"inputs": ["1"], "outputs": []}, "same length"),
        ({"inputs": ["1"], "outputs": [True]}, "output is True, which is not text"),
        ({"fn_name": "f(", "inputs": ["1"], "outputs": ["1"]}, "'f(' is not the name of a function"),
        ([{"input": "1"}], "output is None"),
        ("assert f(", "line 1"),
        (["x = 1"], "no assert"),
        ("42", "line 1"),
    ],
)
def test_labels_without_usable_tests_are_rejected(tmp_path: Path, label: object, part: str) -> None:
    rows: list[dict[str, object]] = [{"prompt": "p?", "label": label}]
    with pytest.raises(ConfigError) as raised:
        registry.of_source(dataset(tmp_path, rows)).problems("train")
    assert "train.jsonl, line 1" in str(raised.value) and part in str(raised.value)


def test_unusable_limits_are_rejected(tmp_path: Path) -> None:
    for name, value in (("program_memory_mib", 1), ("grading_workers", 0), ("grading_timeout_s", float("nan"))):
        with pytest.raises(ConfigError, match=f"data.{name}="):
            registry.of_source(dataset(tmp_path, [], **{name: value}))


def test_missing_bubblewrap_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    task_set = registry.of_source(dataset(tmp_path, [{"prompt": "p?", "label": TESTS}]))
    assert isinstance(task_set, Checked)
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        task_set.check()


def test_run_does_not_start_without_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dataset(tmp_path, [{"prompt": "p?", "label": TESTS}])
    monkeypatch.setenv("PATH", str(tmp_path))
    data = f"{{train: {source.data.train}, heldout: {source.data.heldout}}}"
    run = tmp_path / "run"
    code, _, error = icrl("train", "quickstart", f"run_dir={run}", f"tasks.sources=[{{name: code, data: {data}}}]")
    assert code == 2 and error.startswith("error: ") and "apt-get install bubblewrap" in error
    assert not run.exists()
