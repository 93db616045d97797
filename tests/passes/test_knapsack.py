"""The multiple-choice knapsack against all choices there are."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlower.ir import BitlowerError
from bitlower.passes._knapsack import Limit, greedy, solve, spent, total

LOSS = st.one_of(st.integers(0, 20).map(float), st.floats(0, 1e6), st.floats(1e-9, 1e-3), st.just(math.inf))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[Limit]]:
    """Up to 5 items of up to 4 choices, one or two limits, costs from small to very large."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    losses = [draw(st.lists(LOSS, min_size=n, max_size=n)) for n in sizes]
    limits = []
    for name in draw(st.sampled_from([("a",), ("a", "b")])):
        largest = draw(st.sampled_from([3, 100, 10**9]))
        costs = tuple(tuple(draw(st.lists(st.integers(0, largest), min_size=n, max_size=n))) for n in sizes)
        limits.append(Limit(name, costs, draw(st.integers(0, largest * len(sizes)))))
    return losses, limits


def brute_force(losses: list[list[float]], limits: list[Limit]) -> float | None:
    """The least loss of all choices within the limits; None where there is none."""
    choices = itertools.product(*(range(len(row)) for row in losses))
    fitting = [total(losses, c) for c in choices if all(spent(limit, c) <= limit.most for limit in limits)]
    return min((loss for loss in fitting if math.isfinite(loss)), default=None)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_solution_is_the_best_of_all_choices(problem: tuple[list[list[float]], list[Limit]]) -> None:
    losses, limits = problem
    expected = brute_force(losses, limits)
    if expected is None:
        with pytest.raises(BitlowerError, match="no assignment"):
            solve(losses, limits)
        return
    solution = solve(losses, limits)
    assert all(spent(limit, solution.choice) <= limit.most for limit in limits)
    assert solution.loss == total(losses, solution.choice) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert solution.bound <= expected * (1 + 1e-9) + 1e-12
    assert solution.gap <= 1e-6


@settings(max_examples=100, deadline=None)
@given(problems())
def test_greedy_keeps_within_the_limits(problem: tuple[list[list[float]], list[Limit]]) -> None:
    losses, limits = problem
    choice = greedy(losses, limits)
    if choice is not None:
        assert all(spent(limit, choice) <= limit.most for limit in limits)


def test_greedy_can_be_beaten() -> None:
    """The step that is cheapest by the cost saves too little, and a second one has to follow."""
    losses = [[0.0, 1.0], [0.0, 10.0]]
    limits = [Limit("bytes", ((6, 1), (20, 2)), 10)]
    assert (greedy(losses, limits), solve(losses, limits).choice) == ((1, 1), (0, 1))
    assert solve(losses, limits).loss == 10.0


def test_there_may_be_no_limit() -> None:
    assert solve([[3.0, 1.0], [0.0, 0.0]], []).loss == 1.0


def test_no_choice_within_the_limits_is_an_error() -> None:
    with pytest.raises(BitlowerError, match="bytes of at most 3"):
        solve([[0.0, 1.0]], [Limit("bytes", ((5, 4),), 3)])


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """Some versions of the solver print whatever they are told."""
    losses = [[(i * 7 % 13) / 4**width for width in (2, 3, 4, 8)] for i in range(300)]
    costs = tuple(tuple((1000 + i * 37 % 11) * width for width in (2, 3, 4, 8)) for i in range(300))
    solution = solve(losses, [Limit("bits", costs, 1_200_000)])
    assert capfd.readouterr().out == ""
    assert solution.gap <= 1e-6
    assert "ptimal" in solution.status
