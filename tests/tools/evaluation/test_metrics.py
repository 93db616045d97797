"""Measures against scipy, against hand results, and against identities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bitlower.ir import CheckError
from bitlower.tools.evaluation.metrics import accuracy, f1, matthews, pearson, spearman

NUMBER = st.integers(-50, 50).map(float)


@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=2, max_size=30))
def test_correlations_agree_with_scipy(pairs: list[tuple[float, float]]) -> None:
    other, values = zip(*pairs, strict=True)
    if len(set(values)) == 1 or len(set(other)) == 1:
        with pytest.raises(CheckError, match="all values are equal"):
            pearson(other, values)
        return
    assert pearson(other, values) == pytest.approx(stats.pearsonr(other, values).statistic, abs=1e-9)
    assert spearman(other, values) == pytest.approx(stats.spearmanr(other, values).statistic, abs=1e-9)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_correlations_of_tiny_and_huge_values(size: float) -> None:
    assert pearson([size, 2 * size, 3 * size], [1.0, 2.0, 3.0]) == pytest.approx(1.0)


def test_spearman_gives_ties_their_mean_rank() -> None:
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, spreads 4.5 and 5
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert spearman([1, 10, 100], [3, 2, 1]) == -1.0


def test_labels_by_hand() -> None:
    expected = [1, 1, 1, 0, 0, 0, 0, 1]
    predicted = [1, 1, 0, 0, 0, 1, 0, 1]  # tp 3, fn 1, fp 1, tn 3
    assert accuracy(predicted, expected) == 6 / 8
    assert f1(predicted, expected) == 6 / 8
    assert matthews(predicted, expected) == pytest.approx((3 * 3 - 1 * 1) / np.sqrt(4 * 4 * 4 * 4))


def test_three_labels_use_the_mean_f1() -> None:
    # label 0: 1 hit of 2 and 1; label 1: 1 of 1 and 2; label 2: 1 of 1 and 1
    assert f1([0, 1, 1, 2], [0, 0, 1, 2]) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_a_label_that_neither_side_has_counts_nothing() -> None:
    assert f1([0, 2, 2], [0, 2, 2]) == pytest.approx((1 + 0 + 1) / 3)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
def test_matthews_of_two_labels_is_their_correlation(pairs: list[tuple[int, int]]) -> None:
    predicted, expected = zip(*pairs, strict=True)
    if len(set(predicted)) == 1 or len(set(expected)) == 1:
        assert matthews(predicted, expected) == 0.0
    else:
        assert matthews(predicted, expected) == pytest.approx(pearson(predicted, expected), abs=1e-12)


@pytest.mark.parametrize(("predicted", "expected"), [([1.0], [1.0]), ([1, 2], [1, 2, 3]), ([1, np.nan], [1, 2])])
def test_correlations_refuse_what_has_none(predicted: list[float], expected: list[float]) -> None:
    with pytest.raises(CheckError):
        pearson(predicted, expected)


def test_labels_must_pair_up() -> None:
    with pytest.raises(CheckError, match="pair up"):
        accuracy([], [])
