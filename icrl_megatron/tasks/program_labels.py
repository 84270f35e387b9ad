"""Labels of programming problems: test cases in the forms in which they are published.

    {"inputs": [...], "outputs": [...]}, [{"input": ..., "output": ...}, ...]     programs that read and print
    {"fn_name": "f", "inputs": [[1, 2]], "outputs": [3]}                         functions, or methods of Solution
    ["assert f(1) == 2", ...], or such lines as text                             functions
    "def check(candidate): ..." with "entry_point", "def test_f(): ..."          functions (HumanEval, pytest)

Expected values stay outside the sandbox, except for tests of another form than `assert CALL == LITERAL`: those are
evaluated in the program's process, which could read them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from icrl_megatron.tasks.datasets import DataRow
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.sandbox import OUTPUT_BYTES
from icrl_megatron.utils.sandbox_guest import encoded

_LISTED = "def _as_lists(v):\n    return [_as_lists(p) for p in v] if isinstance(v, (list, tuple)) else v"
"""JSON has no tuples: what a program returns is compared as lists."""
_PYTHON = ("", "python", "python3", "py")


@dataclass(frozen=True)
class Case:
    """One test. With `value`, the program is imported and that expression is evaluated; otherwise the program is
    run."""

    expected: str
    """The expected output, or the encoded value of the expression."""
    stdin: str = ""
    setup: str = ""
    """Statements before the expression."""
    value: str = ""
    or_expected: str = ""
    """Another good value of the expression."""


def program_problem(row: DataRow) -> str:
    """`Task.problem` of a row. Raises ConfigError if its label holds no tests that can be run."""
    try:
        cases = list(cases_of(row.label))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{row.where}: the label holds no test cases ({error}); fix or delete the row") from error
    if any(len(case.expected) > OUTPUT_BYTES // 2 for case in cases):
        raise ConfigError(f"{row.where}: a test expects over {OUTPUT_BYTES >> 21} MiB; delete it from the row")
    made = [{name: text for name, text in asdict(case).items() if text or name == "expected"} for case in cases]
    return row.problem(cases=made)


def cases_of(label: str) -> Iterator[Case]:
    """The tests in a label. Raises ValueError, TypeError or SyntaxError if there are none."""
    try:
        given = json.loads(label)
    except ValueError:
        given = [label]
    name = ""
    if isinstance(given, dict):
        if str(given.get("language") or "").casefold() not in _PYTHON:
            raise ValueError(f"tests in {given['language']!r}, not Python")
        name = str(given.get("fn_name") or given.get("entry_point") or "")
        if given.get("type") == "function_call" and not name:
            raise ValueError("tests that call a function, without its name in fn_name")
        if isinstance(given.get("test"), str):
            yield from _of_source(given["test"], name)
            return
        given = given.get("test_cases") or _pairs(given)
    if not isinstance(given, list) or not given:
        raise ValueError("an empty list, or neither pairs of input and output nor asserts")
    for test in given:
        if isinstance(test, dict):
            yield _of_pair(test, name)
        else:
            yield from _of_source(str(test), name)


def _pairs(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    inputs, outputs = given.get("inputs"), given.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("inputs and outputs must be lists of the same length")
    return [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]


def _of_pair(test: Mapping[str, Any], name: str) -> Case:
    """A test with input and output: of a function if one is named, else of a program that reads and prints."""
    kind = str(test.get("testtype") or test.get("type") or "")
    name = str(test.get("fn_name") or name)
    if name:
        return _of_function(name, test.get("input"), test.get("output"), wrapped=not kind)
    if kind in ("functional", "function_call"):
        raise ValueError("tests of a function without its name; data.shape=livecodebench reads it from metadata")
    return Case(_lines(test.get("output"), "output"), stdin=_lines(test.get("input"), "input"))


def _of_function(name: str, given: Any, output: Any, wrapped: bool) -> Case:
    """A call of a function, or of a method of the class Solution. Arguments are a list, or lines of JSON. `wrapped`: an
    expected list of one value may also stand for that value, as in APPS."""
    if not name.isidentifier():
        raise ValueError(f"{name!r:.50} is not the name of a function")
    arguments = given if isinstance(given, list) else [_literal(line) for line in str(given).splitlines()]
    expected = _literal(output) if isinstance(output, str) and not isinstance(given, list) else output
    called = f"getattr(globals().get('Solution', object)(), {name!r}, globals().get({name!r}))"
    single = expected[0] if wrapped and isinstance(expected, list) and len(expected) == 1 else expected
    return Case(
        encoded(expected),
        setup=_LISTED,
        value=f"_as_lists({called}({', '.join(map(repr, arguments))}))",
        or_expected="" if single is expected else encoded(single),
    )


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _lines(value: Any, what: str) -> str:
    """Text unchanged; the elements of a list become lines, a form that some datasets use; numbers become text."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.60}, which is not text")
    return value


# Tests in Python


def _of_source(source: str, entry_point: str) -> Iterator[Case]:
    """Asserts, HumanEval's check(candidate), or pytest's functions test_...."""
    body = [statement for statement in ast.parse(source).body if not _of_solution(statement)]
    if any("pytest" in ast.unparse(statement) for statement in body):
        raise ValueError("tests that need the package pytest; the sandbox has the standard library only")
    functions = [statement for statement in body if isinstance(statement, ast.FunctionDef)]
    check = next((f for f in functions if f.name == "check" and len(f.args.args) == 1), None)
    tests = [f for f in functions if f.name.startswith("test") and not f.args.args]
    if check is not None:
        name = entry_point or _checked(body)
        yield from _of_check(check, name, [s for s in body if s is not check and not _calls(s, "check")])
    elif tests:
        setup = [s for s in body if s not in tests and not isinstance(s, ast.If | ast.Expr)]
        for test in tests:
            yield from _of_body(setup, test.body) if _is_straight(test.body) else [_whole(setup, test, "")]
    else:
        yield from _of_body([], body)


def _of_solution(statement: ast.stmt) -> bool:
    """An import of the program under the name `solution`, which is not needed."""
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "solution"
    return isinstance(statement, ast.Import) and [one.name for one in statement.names] == ["solution"]


def _calls(statement: ast.stmt, name: str) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == name


def _checked(body: Sequence[ast.stmt]) -> str:
    """The name in `check(name)` after the tests."""
    for statement in body:
        if _calls(statement, "check") and len(arguments := statement.value.args) == 1:  # type: ignore[attr-defined]
            return ast.unparse(arguments[0])
    raise ValueError("check(candidate) without entry_point or a call; data.shape=humaneval reads that column")


def _of_check(check: ast.FunctionDef, name: str, setup: Sequence[ast.stmt]) -> Iterator[Case]:
    if not name.isidentifier():
        raise ValueError(f"{name!r:.50} is not the name of a function")
    if not _is_straight(check.body):
        yield _whole(setup, check, name)
        return
    yield from _of_body([*setup, ast.parse(f"{check.args.args[0].arg} = {name}").body[0]], check.body)


def _is_straight(body: Sequence[ast.stmt]) -> bool:
    """Whether each assert of a function can be evaluated by itself, after the other statements."""
    kinds = ast.Assert | ast.Assign | ast.Import | ast.ImportFrom | ast.Expr | ast.Pass
    return any(isinstance(s, ast.Assert) for s in body) and all(isinstance(s, kinds) for s in body)


def _whole(setup: Sequence[ast.stmt], test: ast.FunctionDef, argument: str) -> Case:
    """A test with loops or the like runs as a whole: it raises AssertionError in the program's process."""
    source = "\n".join(ast.unparse(statement) for statement in (*setup, test))
    return Case(encoded(None), setup=source, value=f"{test.name}({argument})")


def _of_body(before: Sequence[ast.stmt], body: Sequence[ast.stmt]) -> Iterator[Case]:
    setup = [ast.unparse(statement) for statement in before]
    found = False
    for statement in body:
        if isinstance(statement, ast.Assert):
            found = True
            value, expected = _split(statement.test)
            yield Case(encoded(expected), setup="\n".join(setup), value=value)
        else:
            setup.append(ast.unparse(statement))
    if not found:
        raise ValueError(f"no assert in {' '.join(setup)[:60]!r}")


def _split(test: ast.expr) -> tuple[str, Any]:
    """(expression, expected value). A literal that the expression is compared with is split off."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
        for value, literal in ((test.left, test.comparators[0]), (test.comparators[0], test.left)):
            if _is_literal(literal):
                asked, expected = ast.unparse(value), ast.literal_eval(literal)
                if isinstance(test.ops[0], ast.Is):  # 1 equals True, but is not it
                    return f"(lambda v: (type(v).__name__, v))({asked})", (type(expected).__name__, expected)
                return asked, expected
    return f"bool({ast.unparse(test)})", True


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return False
    return True
