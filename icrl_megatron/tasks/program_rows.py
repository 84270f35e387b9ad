"""Rows of published sets of programming problems, in their own columns (`data.shape`, or recognized)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from icrl_megatron.tasks import row_shapes
from icrl_megatron.tasks.row_shapes import Fields, Shaped, WrongRow, begun, required


def humaneval(row: Fields) -> Shaped:
    """HumanEval: prompt (the beginning of a function), entry_point, test with check(candidate)."""
    label = {"test": _text(row, "test"), "entry_point": _text(row, "entry_point")}
    prompt = f"Complete this function. Give the whole of it.\n```python\n{_text(row, 'prompt').strip()}\n```"
    return Shaped(prompt, json.dumps(label, ensure_ascii=False))


def mbpp(row: Fields) -> Shaped:
    """MBPP: text or prompt, test_list, test_setup_code or test_imports. The first test shows the function's name, as
    usual for this set."""
    tests = required(row, "test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise WrongRow("column 'test_list' is not a list of asserts")
    imports = row.get("test_imports") or []
    setup = "\n".join([str(row.get("test_setup_code") or ""), *map(str, imports)]).strip()
    asked = _text(row, "text" if row.get("text") else "prompt")
    label = [f"{setup}\n{test}" if setup else test for test in tests]
    return Shaped(f"{asked}\n\nIt must pass this test:\n{tests[0]}", json.dumps(label, ensure_ascii=False))


def apps(row: Fields) -> Shaped:
    """APPS and TACO: question, starter_code, input_output (JSON text), difficulty."""
    tests = required(row, "input_output")
    try:
        label = json.loads(tests) if isinstance(tests, str) else tests
    except (ValueError, RecursionError) as error:
        raise WrongRow(f"column 'input_output' is not JSON ({error})") from error
    if not isinstance(label, Mapping):
        raise WrongRow("column 'input_output' holds no object with inputs and outputs")
    prompt = begun(_text(row, "question"), row.get("starter_code"))
    return Shaped(prompt, json.dumps(label, ensure_ascii=False), str(row.get("difficulty") or ""))


def kodcode(row: Fields) -> Shaped:
    """KodCode: question, test (pytest functions), test_info with the function's declaration."""
    question, tests = _text(row, "question"), _text(row, "test")
    info = [one for one in row.get("test_info") or [] if isinstance(one, Mapping)]
    declared = [one["function_declaration"] for one in info if one.get("function_declaration")]
    signature = "\n\nDeclare it like this: " + "; ".join(map(str, declared)) if declared else ""
    return Shaped(question + signature, tests)


SHAPES: dict[str, Callable[[Fields], Shaped]] = {
    "gaia": row_shapes.gaia,
    "browsecomp": row_shapes.browsecomp,
    "hle": row_shapes.hle,
    "webwalker": row_shapes.webwalker,
    "livecodebench": row_shapes.livecodebench,
    "humaneval": humaneval,
    "mbpp": mbpp,
    "apps": apps,
    "kodcode": kodcode,
}
_KNOWN = {
    "humaneval": {"prompt", "entry_point", "test"},
    "mbpp": {"test_list"},
    "apps": {"question", "input_output"},
    "kodcode": {"question", "test", "test_info"},
    "livecodebench": {"question_content", "public_test_cases", "private_test_cases", "metadata"},
}


def recognized(row: Fields) -> str:
    """The shape of a row with the columns of one of these sets; empty for any other."""
    return next((shape for shape, columns in _KNOWN.items() if columns <= set(row)), "")


def _text(row: Fields, column: str) -> str:
    found = required(row, column)
    if not isinstance(found, str):
        raise WrongRow(f"column {column!r} is not text")
    return found
