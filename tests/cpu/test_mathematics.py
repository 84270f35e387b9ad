"""Grading of mathematics: known difficult cases, agreement with sympy, and the worker pool."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from fractions import Fraction

import pytest

pytest.importorskip("math_verify")

import sympy
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.tasks.answers import last_box
from icrl_megatron.tasks.formulas import parse_in_two_stages
from icrl_megatron.tasks.grader import Grader
from icrl_megatron.tasks.grading import correct

ENDLESS = r"\sin 9^{9^{9^9}}"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    made = Grader(workers=2, timeout_s=2.0)
    yield made
    made.close()


# Answers that math-verify alone misgrades, or misgrades when it is called carelessly.
TRAPS = [
    # Without delimiters, only part of a label is parsed.
    ("3", r"3\sqrt{13}", False),
    (r"3\sqrt{13}", r"3\sqrt{13}", True),
    (r"\sqrt{117}", r"$3\sqrt{13}$", True),
    ("7", "3, 5, 7", False),
    ("3, 5, 7", "3, 5, 7", True),
    (r"\{7, 3, 5\}", "3, 5, 7", True),
    ("5", "6 - 5i", False),
    ("6-5i", "6 - 5i", True),
    ("-5i + 6", "6 - 5i", True),
    # Scientific notation is not a product with Euler's number.
    ("4.5e33", "4.5e33", True),
    (r"4.5 \times 10^{33}", "4.5e33", True),
    (r"4.5 \cdot e \cdot 33", "4.5e33", False),
    ("1e3", "1000", True),
    ("1e-3", "0.001", True),
    # Order, brackets and units.
    ("(2, 1)", "(1, 2)", False),
    ("(1, 2)", "(1, 2)", True),
    ("[1, 2)", "[1, 2)", True),
    (r"90^\circ", "90", True),
    (r"5 \text{ cm}", "5", True),
    ("x = 3", "3", True),
    # Common spellings of numbers.
    ("1,000", "1000", True),
    ("50\\%", "0.5", True),
    (r"\frac12", "0.5", True),
    ("3.0", "3", True),
    ("0.3333", r"\frac{1}{3}", False),
    # Words.
    (r"\text{Evelyn}", r"\text{Evelyn}", True),
    ("B", "A", False),
    ("", "3", False),
    (r"\boxed{3}", "3", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
    (r"\begin{pmatrix}1&2\\4&3\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
]


@pytest.mark.parametrize(("answer", "label", "right"), TRAPS)
def test_difficult_answers_are_graded_correctly(answer: str, label: str, right: bool) -> None:
    assert correct(answer, label, 0.0) is right


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\fbox{8}", "8"),
        (r"\boxed {9}", "9"),
        ("no box, 7", None),
        (r"\boxed{", None),
    ],
)
def test_the_last_complete_box_counts(text: str, box: str | None) -> None:
    assert last_box(text) == box


@given(st.text(alphabet="\\boxed{}fa1 ", max_size=60))
def test_last_box_handles_any_text(text: str) -> None:
    found = last_box(text)
    assert found is None or found in text


def test_tolerance_applies_only_to_plain_numbers() -> None:
    assert not correct("3.14", "3.1416", 0.0)
    assert correct("3.14", "3.1416", 0.01)
    assert correct("1.01e-7", "1.0e-7", 0.02) and not correct("1.2e-7", "1.0e-7", 0.02)
    assert not correct("-3.14", "3.14", 0.01) and not correct("0.001", "0", 0.01)
    assert not correct(r"3.14 x", "3.1416 x", 0.01)


@given(st.fractions(max_denominator=50), st.integers(1, 9))
def test_equal_fractions_match_in_any_spelling(value: Fraction, factor: int) -> None:
    sign = "-" if value < 0 else ""
    written = rf"{sign}\frac{{{abs(value.numerator) * factor}}}{{{value.denominator * factor}}}"
    label = str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"
    assert correct(written, label, 0.0)
    assert not correct(written, str(value + Fraction(1, 7)), 0.0)


def random_expression(rng: random.Random, depth: int) -> sympy.Expr:
    x = sympy.Symbol("x")
    if depth == 0:
        return rng.choice([x, sympy.Integer(rng.randint(1, 9)), sympy.sqrt(rng.choice([2, 3, 5])), sympy.pi])
    left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    return rng.choice([lambda: left + right, lambda: left * right, lambda: left - right, lambda: left**2])()


def test_grader_agrees_with_sympy() -> None:
    """An expanded form of a generated expression is correct, and an expression with another value is wrong."""
    rng, x, disagreements, cases = random.Random(5), sympy.Symbol("x"), [], 0
    while cases < 60:
        expression = random_expression(rng, 2)
        other = expression + rng.choice([0, 0, 1])
        if not expression.free_symbols <= {x} or expression in (sympy.oo, sympy.nan):
            continue
        cases += 1
        same = sympy.simplify(sympy.expand(other) - expression) == 0
        answer, label = sympy.latex(sympy.expand(other)), sympy.latex(expression)
        if correct(answer, label, 0.0) is not bool(same):
            disagreements.append((answer, label, same))
    assert not disagreements


def test_two_stage_parsing_gives_the_same_trees() -> None:
    """ANTLR's fast prediction mode (SLL) builds the same trees as its full mode (LL)."""
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    parse_in_two_stages()
    made = latex2sympy2._Latex2Sympy
    assert made.__name__ == "TwoStages"
    used: list[object] = []

    def tree(text: str, mode: object) -> str | None:
        reader = made()
        reader.mode = mode
        parser = reader.create_parser(text)
        assert parser._interp.predictionMode is mode
        used.append(mode)
        try:
            return str(parser.math().toStringTree(recog=parser))
        except Exception:
            return None

    rng = random.Random(3)
    texts = [sympy.latex(random_expression(rng, 2)) for _ in range(25)]
    texts += [text for answer, label, _ in TRAPS for text in (answer, label)]
    read = 0
    for text in texts:
        fast = tree(text, PredictionMode.SLL)
        if fast is not None:  # if the fast mode fails, the full mode is used
            assert fast == tree(text, PredictionMode.LL), text
            read += 1
    assert read > 50 and latex2sympy2.latex2sympy("2x") == 2 * sympy.Symbol("x")


# The worker pool


def grade(grader: Grader, *pairs: tuple[str, str]) -> list[bool]:
    async def all_at_once() -> list[bool]:
        return await asyncio.gather(*(grader.correct(answer, label) for answer, label in pairs))

    return asyncio.run(all_at_once())


def test_endless_grading_costs_one_worker_and_no_other_answer() -> None:
    pool = Grader(workers=2, timeout_s=1.0)
    try:
        verdicts = grade(pool, (ENDLESS, "3"), *[(str(i), str(i % 2)) for i in range(30)])
        assert verdicts == [False, True, True, *[False] * 28]
        assert pool.killed == 1
        # The pool is complete again, and works on another event loop.
        assert grade(pool, (r"\frac{2}{4}", r"\frac{1}{2}")) == [True]
    finally:
        pool.close()


def test_dead_worker_is_replaced(grader: Grader) -> None:
    assert grade(grader, (r"\frac{3}{6}", r"\frac{1}{2}")) == [True]
    worker = grader._idle.get_nowait()
    worker._process.kill()
    grader._idle.put(worker)
    assert grade(grader, (r"\frac{3}{6}", r"\frac{1}{2}"), (r"\frac{3}{7}", r"\frac{1}{2}")) == [True, False]


@pytest.mark.parametrize(
    "answer",
    ["9" * 5_000_000, "\\frac{" * 300, "{" * 1999, "\x00\x01\x1b[2J", "\ud800", "(" * 1500, "\\text{" * 200, "\n"],
)
def test_malicious_answers_are_wrong_and_harmless(grader: Grader, answer: str) -> None:
    begun = time.monotonic()
    assert grade(grader, (answer, "3"), ("3", "3")) == [False, True]
    assert time.monotonic() - begun < 300
