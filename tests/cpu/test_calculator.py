"""The calculator: exact against Python's fractions, how it writes numbers, and what it refuses."""

from __future__ import annotations

import asyncio
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.agents.calculator import Calculator
from icrl_megatron.agents.tools import ToolUseError


def compute(expression: str) -> str:
    return asyncio.run(Calculator().call({"expression": expression}))


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str) | st.sampled_from(["0.5", "2.75", "10.01"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=12,
)


@given(EXPRESSIONS)
def test_the_calculator_is_exact(expression: str) -> None:
    exact = re.sub(r"[\d.]+", lambda number: f"Fraction('{number[0]}')", expression)
    try:
        want = eval(exact, {"Fraction": Fraction})  # built above, of numbers and operators only
    except ZeroDivisionError:
        with pytest.raises(ToolUseError, match="divides by zero"):
            compute(expression)
        return
    assert Fraction(compute(expression).partition(" = ")[0]) == want


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2^10", "1024"),
        ("-1/8", "-0.125"),
        ("1/3", "1/3 = 0.333333333333"),
        ("10**-3", "0.001"),
        ("-7//2", "-4"),
        ("0.1000000000000000055 * 10**19", "1000000000000000055"),
        ("1_000 + 1e3", "2000"),
    ],
)
def test_how_the_calculator_writes_numbers(expression: str, result: str) -> None:
    assert compute(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "2**5000",
        "1e2000",
        "1e999999999",
        "1e-999999999",
        "True",
        "a + 1",
        "__import__('os')",
        "(lambda: 1)()",
        "1 if 1 else 2",
        "",
        "((1",
        "(" * 390,
    ],
)
def test_the_calculator_refuses_everything_else_at_once(expression: str) -> None:
    began = time.process_time()
    with pytest.raises(ToolUseError, match="cannot be computed"):
        compute(expression)
    assert time.process_time() - began < 1
