"""Grading of short answers: a table of verdicts, exact numbers, words, placeholders, and differences to math-verify."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from fractions import Fraction

import pytest

pytest.importorskip("math_verify")

from grading_pairs import DIFFERENT, EQUAL, MEANINGFUL, MEANINGLESS
from hypothesis import assume, given
from hypothesis import strategies as st

from icrl_megatron.tasks import answers, exact_numbers
from icrl_megatron.tasks.grading import correct, readable


@pytest.mark.parametrize("about", EQUAL)
def test_right_answers_are_accepted(about: str) -> None:
    assert [pair for pair in EQUAL[about] if not correct(*pair, 0.0)] == []


@pytest.mark.parametrize("about", DIFFERENT)
def test_wrong_answers_are_refused(about: str) -> None:
    assert [pair for pair in DIFFERENT[about] if correct(*pair, 0.0)] == []


def test_placeholders_are_no_labels() -> None:
    assert [label for label in MEANINGLESS if readable(label)] == []
    assert [label for label in MEANINGFUL if not readable(label)] == []


@given(st.fractions(max_denominator=10**6), st.integers(-(10**30), 10**30))
def test_numbers_are_exact(value: Fraction, whole: int) -> None:
    assert exact_numbers.value(f"{whole}") == whole == exact_numbers.value(f"{whole:,}")
    assert exact_numbers.value(f"{value.numerator}/{value.denominator}") == value
    assert exact_numbers.value(rf"\frac{{{value.numerator}}}{{{value.denominator}}}") == value
    assert not correct(str(whole + 1), str(whole), 0.0)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 999))
def test_repeating_decimals_are_fractions(whole: int, fixed: int, block: int) -> None:
    repeated = f"{whole}.{fixed}{f'{block:03}' * 40}"
    value = exact_numbers.value(rf"{whole}.{fixed}\overline{{{block:03}}}")
    assert value is not None and abs(value - Fraction(repeated)) < Fraction(1, 10**100)


@given(st.text("0123456789.,/^!+-*(){} \\fracbinomtimes%e", max_size=40))
def test_any_text_is_a_number_or_is_not(text: str) -> None:
    begun = time.monotonic()
    try:
        found = exact_numbers.value(answers.cleaned(text))
    except exact_numbers.TooLarge:
        found = None
    assert found is None or isinstance(found, Fraction)
    assert time.monotonic() - begun < 5


@given(st.text("ABCDEFGHTUVW", min_size=2, max_size=6), st.randoms())
def test_the_order_of_letters_counts(word: str, rng: random.Random) -> None:
    shuffled = "".join(rng.sample(word, len(word)))
    assume(shuffled != word)
    for form in (lambda w: w, lambda w: rf"\text{{{w}}}", lambda w: rf"\textbf{{{w}}}"):
        assert correct(form(word), word, 0.0)
        assert not correct(form(shuffled), word, 0.0)


def test_large_powers_and_factorials_take_no_time() -> None:
    begun = time.process_time()
    for text in ("9^{9^{9^{9}}}", "(10^{9})!", r"\frac{1}{10^{10^{10}}}", "99999!", "2^{2^{2^{2^{2^{2}}}}}"):
        assert correct(text, text.replace(" ", ""), 0.0)
        assert not correct(text, "7", 0.0)
        assert not correct(f"{text}+1", text, 0.0)
    assert time.process_time() - begun < 5


# Generated pairs: (answer, label, verdict). Where math-verify has another verdict, INTENDED says why.


def integers(rng: random.Random) -> tuple[str, str, bool]:
    whole = rng.randint(10**9, 10**15)
    other = whole + rng.choice([0, 1])
    return f"{other:,}", str(whole), other == whole


def small_integers(rng: random.Random) -> tuple[str, str, bool]:
    whole, other = rng.randint(-99, 99), rng.randint(-99, 99)
    return str(other), str(whole), other == whole


def fractions(rng: random.Random) -> tuple[str, str, bool]:
    a, b, times = rng.randint(1, 9), rng.randint(2, 9), rng.randint(1, 5)
    more = rng.choice([0, 1])
    return rf"\frac{{{a * times + more}}}{{{b * times}}}", f"{a}/{b}", not more


def percentages(rng: random.Random) -> tuple[str, str, bool]:
    whole = rng.randint(2, 99)
    return rng.choice([str(whole), rf"{whole}\%", str(whole / 100)]), rf"{whole}\%", True


def letters(rng: random.Random) -> tuple[str, str, bool]:
    word = "".join(rng.sample("ABCDGHT", 4))
    other = "".join(rng.sample(word, 4))
    return other, word, other == word


def lists(rng: random.Random) -> tuple[str, str, bool]:
    some = rng.sample(range(2, 50), 3)
    other = [*some[:2], some[2] + rng.choice([0, 1])]
    return ", ".join(map(str, rng.sample(other, 3))), rf"\{{{', '.join(map(str, some))}\}}", other == some


def decimals(rng: random.Random) -> tuple[str, str, bool]:
    return f"{3.14159265358979:.{rng.randint(6, 12)}f}", r"\pi", False


def intervals(rng: random.Random) -> tuple[str, str, bool]:
    a, b = sorted(rng.sample(range(20), 2))
    end = rng.choice(")]")
    return f"[{a},{b}{end}", f"[{a},{b})", end == ")"


def formulas(rng: random.Random) -> tuple[str, str, bool]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    more = rng.choice([0, 1])
    return f"x^2+{a + b}x+{a * b + more}", f"(x+{a})(x+{b})", not more


def tiny(rng: random.Random) -> tuple[str, str, bool]:
    a, b = rng.randint(60, 90), rng.randint(60, 90)
    return rf"\frac{{1}}{{3^{{{a}}}}}", rf"\frac{{1}}{{3^{{{b}}}}}", a == b


def mixed(rng: random.Random) -> tuple[str, str, bool]:
    whole, over = rng.randint(1, 9), rng.randint(1, 6)
    return f"{whole} {over}/7", rf"\frac{{{7 * whole + over}}}{{7}}", True


def repeating(rng: random.Random) -> tuple[str, str, bool]:
    digit = rng.randint(1, 8)
    return rf"0.\overline{{{digit}}}", rf"\frac{{{digit}}}{{9}}", True


def units(rng: random.Random) -> tuple[str, str, bool]:
    first, second = rng.choices(["cm", "kg", "hours"], k=2)
    return rf"12\text{{ {first}}}", rf"12\text{{ {second}}}", first == second


def bases(rng: random.Random) -> tuple[str, str, bool]:
    base, other = rng.choices([5, 6, 8], k=2)
    return f"32_{base}", f"32_{{{other}}}", base == other


CLASSES: tuple[Callable[[random.Random], tuple[str, str, bool]], ...] = (
    integers, small_integers, fractions, percentages, letters, lists, decimals, intervals, formulas, tiny, mixed,
    repeating, units, bases,
)  # fmt: skip
INTENDED = {
    "letters": "math-verify multiplies letters, in any order",
    "decimals": "a rounded number is not pi",
    "tiny": "math-verify compares numbers rounded to a few decimals",
    "mixed": "math-verify multiplies a whole number and the fraction after it",
    "repeating": "math-verify does not read a line over digits",
    "units": "math-verify drops units, so 12 cm equals 12 kg",
    "bases": "math-verify drops the base of a number",
}


def test_every_difference_to_math_verify_is_intended() -> None:
    from math_verify import parse, verify

    rng, differ = random.Random(7), set()
    for make in CLASSES:
        for _ in range(12):
            answer, label, truth = make(rng)
            assert correct(answer, label, 0.0) is truth, (answer, label)
            theirs = verify(
                *(parse(f"${text}$", parsing_timeout=None) for text in (label, answer)), timeout_seconds=None
            )
            if bool(theirs) is not truth:
                differ.add(make.__name__)
    assert differ == set(INTENDED)
