"""A calculator: exact arithmetic over rational numbers, without evaluating code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from icrl_megatron.agents.tools import Arguments, ToolSpec, ToolUseError

MOST_CHARS, MOST_BITS, MOST_EXPONENT, MOST_DECIMAL_EXPONENT = 400, 4096, 4096, 1000
_BINARY: dict[type, Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator:
    """Answers `expression` with an integer, a finite decimal, or else a fraction."""

    spec = ToolSpec.of_text(
        "calculator",
        "Computes an arithmetic expression exactly: + - * / // % ** and parentheses.",
        "expression",
        maxLength=MOST_CHARS,
    )

    async def call(self, arguments: Arguments) -> str:
        text = str(arguments["expression"])
        source = text.strip().replace("^", "**")
        try:
            return written(_value(ast.parse(source, mode="eval").body, source))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ToolUseError(f"{text[:80]!r} cannot be computed: {_reason(error)}") from error
        except ZeroDivisionError as error:
            raise ToolUseError(f"{text[:80]!r} divides by zero") from error


def _reason(error: BaseException) -> str:
    return (
        "it is not an arithmetic expression" if isinstance(error, SyntaxError) else str(error) or type(error).__name__
    )


def _value(node: ast.expr, source: str) -> Fraction:
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() as number):
            return _bounded(Fraction(number))
        case ast.Constant(value=float()):
            return _decimal(ast.get_source_segment(source, node) or "")
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, source)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner, source)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, source), _value(right, source))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(op)](_value(left, source), _value(right, source))))
    raise ValueError(f"{ast.unparse(node)[:60]!r} is not a number, an operator or a pair of parentheses")


def _decimal(literal: str) -> Fraction:
    """The literal's own value, not the nearest float's. The exponent is checked before 10 is raised to it."""
    number = Decimal(literal)
    if abs(number.adjusted()) > MOST_DECIMAL_EXPONENT:
        raise ValueError("the result is too large or too small")
    return _bounded(Fraction(number))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("only whole exponents are exact")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > MOST_EXPONENT or size * abs(exponent) > MOST_BITS:
        raise ValueError("the result is too large")
    return Fraction(base ** int(exponent))


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > MOST_BITS:
        raise ValueError("the result is too large")
    return number


def written(number: Fraction) -> str:
    """An integer, a finite decimal, or a fraction with a decimal of 12 significant digits."""
    if number.denominator == 1:
        return str(number.numerator)
    rest, places = number.denominator, 0
    for prime in (2, 5):
        power = 0
        while rest % prime == 0:
            rest, power = rest // prime, power + 1
        places = max(places, power)
    if rest == 1 and places <= 20:
        scaled = number * 10**places
        digits = str(abs(scaled.numerator)).rjust(places + 1, "0")
        return f"{'-' if number < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    try:
        return f"{number.numerator}/{number.denominator} = {float(number):.12g}"
    except OverflowError:
        return f"{number.numerator}/{number.denominator}"
