"""Rows of published question sets, in the columns in which they are published (`data.shape`).

Nothing in a row is executed or unpickled. A row that cannot be asked as text alone is `Unusable`, with the reason.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import pickletools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

MAX_TESTS_BYTES = 256 << 20
"""Largest size of the decompressed tests of one row."""
_PICKLED_TEXT = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
"""What a pickle of one text consists of, beside the text itself."""
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}

Fields = Mapping[str, Any]


class Unusable(Exception):
    """The row cannot be asked; the text is the reason, without its place."""


class WrongRow(ValueError):
    """The row does not have this shape; the text says why."""


@dataclass(frozen=True)
class Shaped:
    prompt: str
    label: str
    subset: str = ""
    """Is added to the subset's name, so that results are also reported by it."""
    system: str = ""
    """The system message of its conversation; empty: none."""


def gaia(row: Fields) -> Shaped:
    """GAIA: Question, Final answer, Level, file_name."""
    if row.get("file_name"):
        raise Unusable("it needs an attached file")
    answer = _text(row, "Final answer")
    if answer.strip() == "?":
        raise Unusable("its answer is hidden")
    return Shaped(_text(row, "Question"), answer, f"level{_text(row, 'Level')}")


def browsecomp(row: Fields) -> Shaped:
    """BrowseComp: problem and answer, each base64 of the text XOR the repeated SHA-256 of `canary`."""
    key = hashlib.sha256(_text(row, "canary").encode()).digest()

    def decrypted(column: str) -> str:
        try:
            hidden = base64.b64decode(_text(row, column), validate=True)
            return bytes(a ^ b for a, b in zip(hidden, cycle(key), strict=False)).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise WrongRow(f"column {column!r} is not encrypted with the row's canary ({error})") from error

    return Shaped(decrypted("problem"), decrypted("answer"))


def hle(row: Fields) -> Shaped:
    """Humanity's Last Exam: question, image, answer."""
    if row.get("image"):
        raise Unusable("it needs an image")
    return Shaped(_text(row, "question"), _text(row, "answer"))


def webwalker(row: Fields) -> Shaped:
    """WebWalkerQA: question, root_url, answer."""
    return Shaped(f"{_text(row, 'question')}\n\nWebsite: {_text(row, 'root_url')}", _text(row, "answer"))


def livecodebench(row: Fields) -> Shaped:
    """LiveCodeBench's code generation: question_content, starter_code, metadata, and public and private test cases.

    Tests of a function become asserts about a method of `Solution`, whose arguments are lines of JSON."""
    tests = _tests(row, "public_test_cases") + _tests(row, "private_test_cases")
    prompt = begun(_text(row, "question_content"), row.get("starter_code"))
    try:
        if not any(test["testtype"] == "functional" for test in tests):
            label: list[Any] = [{"input": test["input"], "output": test["output"]} for test in tests]
        else:
            name = json.loads(_text(row, "metadata"))["func_name"]
            if not name.isidentifier():
                raise WrongRow(f"func_name {name!r:.50} is not the name of a function")
            label = [_assert(name, test["input"], test["output"]) for test in tests]
    except WrongRow:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise WrongRow(f"its tests or metadata cannot be read ({error!r:.200})") from error
    return Shaped(prompt, json.dumps(label, ensure_ascii=False), str(row.get("difficulty") or ""))


def required(row: Fields, column: str) -> Any:
    """The value in a column. Raises WrongRow if the row lacks it."""
    if row.get(column) is None:
        raise WrongRow(f"no column {column!r}, there are {', '.join(row) or 'none'}")
    return row[column]


def begun(prompt: str, starter: str | None) -> str:
    """A problem whose solution begins with `starter`, if there is one."""
    return f"{prompt}\n\nBegin with this code:\n```python\n{starter}\n```" if starter else prompt


def _text(row: Fields, column: str) -> str:
    return str(required(row, column))


def _assert(name: str, arguments: str, expected: str) -> str:
    given = ", ".join(repr(json.loads(line)) for line in arguments.splitlines())
    return f"assert Solution().{name}({given}) == {json.loads(expected)!r}"


def _tests(row: Fields, column: str) -> list[Any]:
    """A JSON list, or base64 of the compressed pickle of its text, as private tests are published."""
    given = _text(row, column)
    try:
        found = json.loads(given if given.lstrip().startswith("[") else _unpacked(given))
    except (ValueError, zlib.error, RecursionError) as error:
        raise WrongRow(f"column {column!r} holds no tests ({error})") from error
    if not isinstance(found, list):
        raise WrongRow(f"column {column!r} is not a list of tests")
    return found


def _unpacked(given: str) -> str:
    """The text in base64 of a compressed pickle. The pickle is not executed: its instructions are read, and anything
    but one text is refused. Raises ValueError."""
    unpacking = zlib.decompressobj()
    pickled = unpacking.decompress(base64.b64decode(given, validate=True), MAX_TESTS_BYTES)
    if not unpacking.eof:
        raise ValueError(f"over {MAX_TESTS_BYTES >> 20} MiB of tests, or cut off")
    texts = []
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in _TEXTS:
            texts.append(argument)
        elif code.name not in _PICKLED_TEXT:
            raise ValueError(f"a pickle with {code.name}, where one text is expected; nothing of it was executed")
    if len(texts) != 1:
        raise ValueError(f"a pickle of {len(texts)} texts")
    return str(texts[0])
