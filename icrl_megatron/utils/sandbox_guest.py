"""Runs inside the sandbox: sets its own limits, then runs the program. A script that imports nothing of this package.

    python /guest.py '{"cpu_s": 5, "memory": ..., "file": ..., "report": 7, "call": false}'

It first writes to the report pipe that the sandbox is ready. With `call`, the program is imported, then the expression
on stdin is evaluated in the same process and its value is reported.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any

READY = b"ready\n"
OPEN_FILES = 64
REPORT_CHARS = 3 << 20


def canonical(value: Any) -> Any:
    """A value as JSON. Values that Python calls equal, among numbers, text and containers of them, have equal JSON."""
    if isinstance(value, bool | int):
        return ["number", hex(value)]
    if isinstance(value, float):
        return ["number", hex(int(value)) if value.is_integer() else repr(float(value))]
    if isinstance(value, complex):
        return ["complex", repr(complex(value))] if value.imag else canonical(value.real)
    if isinstance(value, str):
        return ["str", str(value)]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if callable(ratio := getattr(value, "as_integer_ratio", None)) and not isinstance(value, type):
        return _rational(value, ratio)
    for kind in (list, tuple):
        if isinstance(value, kind):
            return [kind.__name__, [canonical(part) for part in value]]
    if isinstance(value, set | frozenset):
        return ["set", sorted((canonical(part) for part in value), key=json.dumps)]
    if isinstance(value, dict):
        pairs = ([canonical(key), canonical(part)] for key, part in value.items())
        return ["dict", sorted(pairs, key=json.dumps)]
    return ["nothing"] if value is None else ["other", type(value).__name__]


def _rational(value: Any, ratio: Callable[[], tuple[int, int]]) -> Any:
    """A Fraction or a Decimal: the JSON of the equal int or float, if there is one."""
    try:
        above, below = ratio()
    except (ValueError, OverflowError):  # Decimal's infinity and NaN
        return canonical(float(value))
    if below == 1:
        return ["number", hex(above)]
    try:
        near = above / below
    except OverflowError:
        return ["number", f"{above}/{below}"]
    return ["number", repr(near) if near.as_integer_ratio() == (above, below) else f"{above}/{below}"]


def encoded(value: Any) -> str:
    return json.dumps(canonical(value))


def _limit(limits: dict[str, Any]) -> None:
    """Hard limits, which an unprivileged process cannot raise again."""
    cpu = limits["cpu_s"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # a program may ignore the signal of the soft limit
    for what, value in (
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["file"]),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))


def main() -> None:
    limits = json.loads(sys.argv[1])
    _limit(limits)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # python -S does not define them
    sys.argv = ["program.py"]
    with open("/program.py", encoding="utf-8") as file:
        source = file.read()
    os.write(limits["report"], READY)
    names: dict[str, Any] = {"__name__": "program" if limits["call"] else "__main__", "__builtins__": builtins}
    try:
        if limits["call"]:  # published problems declare functions with List and Optional, without imports
            import typing

            names |= {name: getattr(typing, name) for name in typing.__all__}
        exec(compile(source, "program.py", "exec"), names)
        if limits["call"]:
            test = json.loads(sys.stdin.read())
            value = _evaluated(test["setup"], test["value"], names)
            with open(limits["report"], "wb") as report:
                report.write(f"{test['nonce']}\n{encoded(value)}\n{value!r}"[:REPORT_CHARS].encode())
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def _evaluated(setup: str, value: str, names: dict[str, Any]) -> Any:
    exec(compile(setup, "test", "exec"), names)
    return eval(compile(value, "test", "eval"), names)


if __name__ == "__main__":
    main()
