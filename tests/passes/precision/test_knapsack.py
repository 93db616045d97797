"""The multiple-choice knapsack against all choices there are."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlower.ir import BitlowerError
from bitlower.passes.precision._knapsack import Limit, Pair, greedy, least, solve, spent, total

LOSS = st.one_of(st.integers(0, 20).map(float), st.floats(0, 1e6), st.floats(1e-9, 1e-3), st.just(math.inf))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[Limit]]:
    """Up to 5 items of up to 4 choices, one or two limits, costs from small to very large, some of them of pairs."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    losses = [draw(st.lists(LOSS, min_size=n, max_size=n)) for n in sizes]
    limits = []
    for name in draw(st.sampled_from([("a",), ("a", "b")])):
        largest = draw(st.sampled_from([3, 100, 10**9]))
        costs = tuple(tuple(draw(st.lists(st.integers(0, largest), min_size=n, max_size=n))) for n in sizes)
        places = list(itertools.combinations(range(len(sizes)), 2))
        joined = draw(st.lists(st.sampled_from(places), max_size=4, unique=True)) if places else []
        few = st.sampled_from([0, largest // 2, largest]) | st.integers(0, largest)  # equal costs, and any
        pairs = tuple(
            Pair(i, j, tuple(tuple(draw(few) for _ in range(sizes[j])) for _ in range(sizes[i]))) for i, j in joined
        )
        limits.append(Limit(name, costs, draw(st.integers(0, largest * (len(sizes) + len(pairs)))), pairs))
    return losses, limits


def cost(limit: Limit, choice: tuple[int, ...]) -> int:
    """What a choice spends, by its definition."""
    joint = [pair.costs[choice[pair.first]][choice[pair.second]] for pair in limit.pairs]
    return sum(limit.costs[i][choice[i]] for i in range(len(choice))) + sum(joint)


def brute_force(losses: list[list[float]], limits: list[Limit]) -> float | None:
    """The least loss of all choices within the limits; None where there is none."""
    choices = itertools.product(*(range(len(row)) for row in losses))
    fitting = [total(losses, c) for c in choices if all(cost(limit, c) <= limit.most for limit in limits)]
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
    assert all(spent(limit, solution.choice) == cost(limit, solution.choice) <= limit.most for limit in limits)
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


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_least_that_can_be_spent(problem: tuple[list[list[float]], list[Limit]]) -> None:
    losses, (first, *others) = problem
    choices = itertools.product(*(range(len(row)) for row in losses))
    fitting = [cost(first, c) for c in choices if all(cost(limit, c) <= limit.most for limit in others)]
    if not fitting:
        with pytest.raises(BitlowerError, match="no assignment"):
            least(first, others)
        return
    assert min(fitting) <= least(first, others) <= min(fitting) + 1e-8 * first.ceiling
    assert max(fitting) <= first.ceiling


def test_two_items_have_to_move_together() -> None:
    """Neither of them saves anything alone."""
    slow, fast = 10, 1
    pair = Pair(0, 1, ((slow, slow), (slow, fast)))
    losses = [[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]]
    limit = Limit("time", ((0, 0), (0, 0), (9, 0)), 10, (pair,))
    assert solve(losses, [limit]).choice == (1, 1, 0)
    assert greedy(losses, [limit]) == (1, 1, 0)


def test_many_items_in_pairs() -> None:
    """Weights and inputs of 60 linears, whose product is fast where both are narrow."""
    widths, losses, pairs = (2, 3, 4, 6, 8, 16), [], []
    for i in range(60):
        size = (1 + i * 37 % 11) * 10_000
        for side in range(2):
            losses.append([(1 + (i * 7 + side * 5) % 13) * 4.0**-width for width in widths])
        costs = tuple(
            tuple(max(size * min(w, 8) // 8, 2 * size if w > 8 or a > 8 else size) for a in widths) for w in widths
        )
        pairs.append(Pair(2 * i, 2 * i + 1, costs))
    limit = Limit("time", ((0,) * 6,) * 120, sum(max(map(max, p.costs)) for p in pairs) * 3 // 4, tuple(pairs))
    solution = solve(losses, [limit])
    assert solution.gap <= 1e-6
    assert spent(limit, solution.choice) <= limit.most
    rough = greedy(losses, [limit])
    assert rough is not None
    assert total(losses, rough) >= solution.loss


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


def test_of_equal_choices_the_first_is_taken() -> None:
    limit = Limit("bytes", ((2, 2, 2), (3, 1, 1)), 5)
    assert solve([[1.0, 1.0, 1.0], [4.0, 2.0, 2.0]], [limit]).choice == (0, 1)


def test_one_byte_too_many_of_a_million_million_is_too_many() -> None:
    """The solver's own tolerance lets the first choices pass; of what is left, one change is the least."""
    size = 10**12
    limit = Limit("bytes", ((size, size - 5),) * 3, 3 * size - 1)
    solution = solve([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]], [limit])
    assert solution.choice == (1, 0, 0)
    assert least(Limit("loss", ((0, 1), (0, 2), (0, 3)), 10), [limit]) == 1


def test_what_the_solver_writes_past_python_is_kept_off(capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    def loud(*arguments: Any, **options: Any) -> Any:
        os.write(1, b"HiGHS run time\n")
        return milp(*arguments, **options)

    milp = scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", loud)
    print("before", end=" ")
    solve([[0.0, 1.0]], [])
    print("after")
    assert capfd.readouterr().out == "before after\n"


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """Some versions of the solver print whatever they are told."""
    losses = [[(i * 7 % 13) / 4**width for width in (2, 3, 4, 8)] for i in range(300)]
    costs = tuple(tuple((1000 + i * 37 % 11) * width for width in (2, 3, 4, 8)) for i in range(300))
    solution = solve(losses, [Limit("bits", costs, 1_200_000)])
    assert capfd.readouterr().out == ""
    assert solution.gap <= 1e-6
    assert "ptimal" in solution.status
