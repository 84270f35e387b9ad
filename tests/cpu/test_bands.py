"""Curves of several seeds as one band."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.report.bands import arm_band, band, interval


def test_a_band_has_the_x_values_that_all_seeds_share() -> None:
    found = band([([0.0, 10.0, 20.0], [0.0, 0.4, 0.8]), ([0.0, 10.0, 20.0], [0.2, 0.6, 1.0])])
    assert (found.seeds, found.x) == (2, (0.0, 10.0, 20.0))
    assert found.mean == pytest.approx((0.1, 0.5, 0.9))
    assert found.low == pytest.approx((0.0, 0.4, 0.8)) and found.high == pytest.approx((0.2, 0.6, 1.0))


def test_no_curve_is_extrapolated() -> None:
    found = band([([0.0, 100.0], [0.0, 1.0]), ([10.0, 60.0], [0.5, 0.5]), ([], [])], points=6)
    assert found.seeds == 2
    assert found.x == pytest.approx((10.0, 20.0, 30.0, 40.0, 50.0, 60.0))
    assert found.mean == pytest.approx([(x / 100 + 0.5) / 2 for x in found.x])


def test_small_and_large_numbers_keep_their_digits() -> None:
    found = band([([1.0, 12_345_678.0], [2.1417063e-7, 0.5])])
    assert found.x == (1.0, 12_345_678.0) and found.mean == pytest.approx((2.1417063e-7, 0.5), rel=1e-5)


def test_the_band_of_one_seed_is_its_curve_and_of_none_is_empty() -> None:
    alone = band([([1.0, 2.0], [0.3, 0.4])])
    assert alone.mean == alone.low == alone.high == (0.3, 0.4)
    assert band([]).seeds == 0 and band([]).x == ()
    assert len(band([(list(range(1000)), [0.5] * 1000)], points=50).x) == 50


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=6))
def test_the_mean_is_in_its_interval_and_the_interval_in_the_range_of_the_seeds(values: list[list[float]]) -> None:
    low, mean, high = interval(np.asarray(values))
    assert (low <= mean + 1e-9).all() and (mean <= high + 1e-9).all()
    assert (low >= np.min(values, axis=0) - 1e-9).all() and (high <= np.max(values, axis=0) + 1e-9).all()


def test_the_interval_of_many_seeds_is_close_to_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, size=(400, 1))
    low, mean, high = interval(values)
    half = 1.96 * values.std() / 20
    assert (low[0], high[0]) == pytest.approx((mean[0] - half, mean[0] + half), abs=0.002)


def test_evaluations_are_plotted_over_the_tokens_generated_so_far() -> None:
    rows = [{"step": 0.0, "heldout/critique_free": 0.1, "tokens/generated_total": 0.0}, {"step": 1.0}]
    rows += [{"step": 2.0, "heldout/critique_free": 0.7, "tokens/generated_total": 50.0}]
    assert arm_band([rows]).x == (0.0, 50.0) and arm_band([rows]).mean == (0.1, 0.7)
