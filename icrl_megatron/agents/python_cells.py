"""Runs inside the sandbox, as its program: the earlier cells of an episode without their output, then the new one.

The first line of this file's text in the sandbox is `REQUEST = ...`, a JSON text with the fields of `agents/python.py`.
It imports nothing of this package.
"""

import _ast  # the module `ast` takes milliseconds to import
import contextlib
import io
import json
import linecache
import sys
import traceback
from typing import Any


def run(code: str, name: str, names: dict[str, Any], show: bool) -> bool:
    """Whether the cell ended without an exception. With `show`, the value of a last expression is printed."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        parsed: Any = compile(code, name, "exec", _ast.PyCF_ONLY_AST, dont_inherit=True)
        last = parsed.body.pop() if parsed.body and isinstance(parsed.body[-1], _ast.Expr) else None
        exec(compile(parsed, name, "exec", dont_inherit=True), names)
        if last is not None:
            value = eval(compile(_ast.Expression(last.value), name, "eval", dont_inherit=True), names)
            if show and value is not None:
                print(repr(value))
    except SystemExit as stop:
        if stop.code not in (None, 0):
            print(f"SystemExit: {stop.code}", file=sys.stderr)
        return stop.code in (None, 0)
    except BaseException as error:
        own = error.__traceback__.tb_next if error.__traceback__ else None  # without this file's own frame
        print("".join(traceback.format_exception(type(error), error, own)), file=sys.stderr)
        return False
    return True


def main(text: str) -> None:
    request = json.loads(text)
    names: dict[str, Any] = {"__name__": "__main__"}
    if request["seeded"]:  # cells that run again must compute the same
        import random

        random.seed(0)
    end = "ran"
    for i, code in enumerate(request["earlier"], start=1):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if not run(code, f"<call {i}>", names, show=False):
                end = "lost"
                break
    else:
        if not run(request["code"], f"<call {len(request['earlier']) + 1}>", names, show=True):
            end = "raised"
    sys.stdout.flush()
    print(f"\n{request['nonce']} {end}", file=sys.__stderr__, flush=True)


if "REQUEST" in globals():
    main(globals()["REQUEST"])
