"""Formulas: equality by math-verify, except that numbers are compared to fifty digits and not to six."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any

_SCIENTIFIC = re.compile(r"(?<![A-Za-z\\])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![A-Za-z\d.])")
DIGITS = 50
"""Digits to which two irrational numbers must agree."""
_POINTS = (
    ("3/7", "5/11", "13/17", "43/47", "53/59", "61/67"),
    ("19/23", "29/31", "37/41", "71/73", "79/83", "89/97"),
)
"""Values of variables at which two formulas that differ are told apart."""


@functools.cache
def parse_in_two_stages() -> None:
    """Makes math-verify's LaTeX parser try the fast prediction mode first. Parsing is most of the cost of grading.

    ANTLR's documentation of `PredictionMode.SLL`: it returns the parse tree that full LL would, or reports a syntax
    error; on an error we parse again with LL. The trees are the same, and so are the verdicts.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    class TwoStages(latex2sympy2._Latex2Sympy):
        mode = PredictionMode.LL

        def create_parser(self, latex_str: str) -> Any:
            parser = super().create_parser(latex_str)
            parser._interp.predictionMode = self.mode
            return parser

        def parse(self, latex_str: str) -> Any:
            self.mode = PredictionMode.SLL
            with contextlib.suppress(Exception):
                return super().parse(latex_str)
            self.mode = PredictionMode.LL
            return super().parse(latex_str)

    latex2sympy2._Latex2Sympy = TwoStages


def parsed(answer: str) -> list[Any]:
    """math-verify's parse of one answer. The answer is always boxed, because a bare one is only partly parsed
    (`3\\sqrt{13}` as 3)."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    parse_in_two_stages()
    configuration = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # math-verify's time limit also uses a signal, and would replace ours.
    answer = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", answer)  # as LaTeX, 4.5e33 is 4.5 times Euler's e
    found: list[Any] = parse(f"$\\boxed{{{answer}}}$", extraction_config=configuration, parsing_timeout=None)
    return found


def equal(given: str, gold: str) -> bool:
    """Whether two cleaned texts are the same formula, set, interval, matrix or relation."""
    from math_verify import verify

    left, right = parsed(given), list(_gold(gold))
    first, second = (next((part for part in found if not isinstance(part, str)), None) for found in (left, right))
    if first is not None and second is not None:
        decided = _decided(first, second)
        if decided is not None:
            return decided
    # The order matters: verify(gold, answer) is not symmetric.
    return bool(verify(right, left, timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def _gold(label: str) -> tuple[Any, ...]:
    """The parsed label, cached because all episodes of a task are graded against it."""
    return tuple(parsed(label))


def _decided(left: Any, right: Any) -> bool | None:
    """Decides numbers, formulas that differ at some point, equations that are multiples of each other, and inequalities
    in one variable; None for the rest."""
    from sympy import Eq, Expr, Rational

    if isinstance(left, Eq) and isinstance(right, Eq):
        sides = (left.lhs, left.rhs, right.lhs, right.rhs)
        return _multiples(left, right) if all(isinstance(side, Expr) for side in sides) else None
    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return _same_solutions(left, right)
    left, right = _exact(left), _exact(right)
    names = sorted({symbol for side in (left, right) for symbol in side.free_symbols}, key=str)
    if not names:
        return _same_number(left, right)
    if len(names) <= len(_POINTS[0]):
        for point in _POINTS:
            values = {name: Rational(part) for name, part in zip(names, point, strict=False)}
            if _same_number(left, right, values) is False:
                return False
    return None


def _exact(expression: Any) -> Any:
    """With decimals as fractions, and i as the imaginary unit."""
    from sympy import Float, I, Rational, Symbol

    swaps: dict[Any, Any] = {number: Rational(str(number)) for number in expression.atoms(Float)}
    for symbol in expression.free_symbols:  # the index of a sum stays
        swaps[symbol] = I if symbol.name == "i" else Symbol(symbol.name)
    return expression.xreplace(swaps).doit()


def _same_number(left: Any, right: Any, at: dict[Any, Any] | None = None) -> bool | None:
    """Whether two formulas have the same value where their variables have these; None if one cannot be computed."""
    try:
        values = [complex_parts(side.evalf(DIGITS + 10, subs=at)) for side in (left, right)]
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return None
    if None in values:
        return None
    (a, b), (c, d) = values  # type: ignore[misc]
    size = max(abs(part) for part in (a, b, c, d))
    return bool(max(abs(a - c), abs(b - d)) <= size / 10**DIGITS)


def complex_parts(number: Any) -> tuple[Any, Any] | None:
    """(real part, imaginary part) of a computed number; None if they are not finite numbers."""
    parts = number.as_real_imag()
    return parts if all(part.is_Number and part.is_finite for part in parts) else None


def _multiples(left: Any, right: Any) -> bool | None:
    """Whether one equation is the other, multiplied by a number; None if it is not."""
    from sympy import cancel

    first, second = (_exact(side.lhs - side.rhs) for side in (left, right))
    ratio = cancel(first / second) if second != 0 else None
    return True if ratio is not None and ratio.is_number and ratio != 0 and ratio.is_finite else None


def _same_solutions(left: Any, right: Any) -> bool | None:
    """Compares inequalities in one variable, and sets of real numbers."""
    from sympy import Set

    try:
        first, second = (side if isinstance(side, Set) else _exact(side).as_set() for side in (left, right))
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return None
    return True if first == second else None if isinstance(left, Set) == isinstance(right, Set) else False
