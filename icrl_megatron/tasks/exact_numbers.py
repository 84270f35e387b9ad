"""Exact values of answers that are numbers: decimals, fractions, and sums, products, powers and factorials of them.

No floats: a number is a `Fraction`, and one that is too large for that is compared as text."""

from __future__ import annotations

import math
import re
from fractions import Fraction

MAX_BITS = 1 << 20
"""Size of the largest numerator or denominator that is computed."""
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:(?:,| |\\,|\{,\}|\\ )\d{3})+(?:\.\d+|(?!\d))")
_DECIMAL = re.compile(r"\d+(?:\.\d*)?|\.\d+")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\{(\d+)\}|\((\d+)\))")
_DOTS = re.compile(r"(\d*)\.(\d*?)(\d{1,8}?)\3+(?:\.\.\.|\\l?dots|\\cdots)")
_SCIENTIFIC = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([+-]?\d{1,6})")
_MIXED = re.compile(r"(-?)(\d+)(?:\\[,; ]|\s)*(?:\\frac\{(\d+)\}\{(\d+)\}|\s(\d+)/(\d+))")


class TooLarge(Exception):
    """The value has more than MAX_BITS bits."""


class _NotANumber(Exception):
    """The text is not an arithmetic expression of numbers."""


def value(text: str) -> Fraction | None:
    """The exact value of a text that `answers.cleaned` has cleaned; None if it is not a number. Raises TooLarge."""
    text = text.strip()
    try:
        if (mixed := _MIXED.fullmatch(text)) is not None:
            sign, whole, *parts = mixed.groups()
            over, under = (int(part) for part in parts if part is not None)
            if under and over < under:
                return (-1 if sign else 1) * (int(whole) + Fraction(over, under))
        if (power := _SCIENTIFIC.fullmatch(text)) is not None:
            return Fraction(power[1]) * _power(Fraction(10), Fraction(int(power[2])))
        return _Parser(text).whole()
    except (_NotANumber, ZeroDivisionError, RecursionError, ValueError):  # ValueError: thousands of digits
        return None


class _Parser:
    """Recursive descent over sums, products, powers and factorials. Without a sign, only a bracket or a command
    multiplies, so `3 4` is not a number."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def whole(self) -> Fraction:
        found = self._sum()
        if self._skip() < len(self._text):
            raise _NotANumber
        return found

    def _skip(self) -> int:
        while self._at < len(self._text) and self._text[self._at] == " ":
            self._at += 1
        return self._at

    def _take(self, *tokens: str) -> str:
        """The first of these texts that comes next; empty if none does."""
        self._skip()
        for token in tokens:
            if self._text.startswith(token, self._at):
                self._at += len(token)
                return token
        return ""

    def _sum(self) -> Fraction:
        found = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            found = _bounded(found + other if sign == "+" else found - other)
        return found

    def _product(self) -> Fraction:
        sign = self._take("+", "-")
        found = self._power()
        while True:
            if self._take("\\cdot", "\\times", "*"):
                found = _bounded(found * self._signed())
            elif self._take("\\div", "/"):
                found = _bounded(found / self._signed())
            elif self._skip() < len(self._text) and self._text[self._at] in "(\\":
                found = _bounded(found * self._power())
            else:
                return -found if sign == "-" else found

    def _signed(self) -> Fraction:
        return -self._power() if self._take("-") else self._power()

    def _power(self) -> Fraction:
        base = self._factorial()
        if not self._take("^"):
            return base
        if self._take("{"):
            exponent = self._sum()
            self._close("}")
        else:
            exponent = self._one_token()
        return _power(base, exponent)

    def _one_token(self) -> Fraction:
        """What `^` or `\\frac` takes without braces: one digit, as in LaTeX, or a number such as 2^10 in plain text."""
        number = re.compile(r"\d+").match(self._text, self._skip())
        if number is None:
            raise _NotANumber
        self._at = number.end()
        return Fraction(number[0])

    def _factorial(self) -> Fraction:
        found = self._atom()
        while self._take("!"):
            if found.denominator != 1 or not found >= 0:
                raise _NotANumber
            if found > 1 << 16:
                raise TooLarge
            found = _bounded(Fraction(math.factorial(found.numerator)))
        return found

    def _atom(self) -> Fraction:
        start = self._skip()
        for pattern in (_REPEATING, _DOTS):
            if (found := pattern.match(self._text, start)) is not None:
                self._at = found.end()
                return _repeating(*[part or "" for part in found.groups()])
        for pattern in (_GROUPED, _DECIMAL):
            if (found := pattern.match(self._text, start)) is not None:
                self._at = found.end()
                return Fraction(re.sub(r"[^\d.]", "", found[0]))
        if self._take("("):
            return self._closed(")")
        if self._take("{"):
            return self._closed("}")
        if self._take("\\frac"):
            return self._argument() / self._argument()
        if self._take("\\binom"):
            above, below = self._argument(), self._argument()
            if above.denominator != 1 or below.denominator != 1 or not 0 <= below <= above <= 1 << 14:
                raise _NotANumber
            return Fraction(math.comb(above.numerator, below.numerator))
        raise _NotANumber

    def _argument(self) -> Fraction:
        if self._take("{"):
            return self._closed("}")
        self._skip()
        digit = self._text[self._at : self._at + 1]
        if not digit.isdigit():
            raise _NotANumber
        self._at += 1
        return Fraction(int(digit))

    def _closed(self, bracket: str) -> Fraction:
        found = self._sum()
        self._close(bracket)
        return found

    def _close(self, bracket: str) -> None:
        if not self._take(bracket):
            raise _NotANumber


def _repeating(whole: str, fixed: str, *blocks: str) -> Fraction:
    block = next(one for one in blocks if one)
    scale = 10 ** len(fixed)
    return Fraction(int(whole + fixed or "0"), scale) + Fraction(int(block), scale * (10 ** len(block) - 1))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise _NotANumber
    if base in (0, 1, -1):
        if base == 0 and exponent < 0:
            raise _NotANumber
        return base ** (exponent.numerator % 2 if base == -1 else min(exponent.numerator, 1))
    if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > MAX_BITS:
        raise TooLarge
    return Fraction(base**exponent.numerator)


def _bounded(found: Fraction) -> Fraction:
    if max(found.numerator.bit_length(), found.denominator.bit_length()) > MAX_BITS:
        raise TooLarge
    return found
