"""The multiple-choice knapsack: one choice for each item, the least sum of losses within limits on sums of costs.

It is solved exactly as a mixed-integer linear program by HiGHS (``scipy.optimize.milp``), which proves how far the
solution can be from the optimum. Costs are whole numbers and limits hold exactly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlower.ir import BitlowerError, CheckError

Floats = NDArray[np.float64]
_GAP = 1e-9
_SCALE = 1e3
_CUTS = 100


@dataclass(frozen=True)
class Limit:
    """A bound ``most`` on a sum of costs; ``costs[i][c]`` is that of item i's choice c, a whole number from 0."""

    name: str
    costs: tuple[tuple[int, ...], ...]
    most: int


@dataclass(frozen=True)
class Solution:
    """What was chosen.

    Args:
        choice: the number of the choice of each item.
        loss: the sum of the chosen losses.
        bound: no choice has a smaller loss; proved by the solver.
        gap: ``(loss − bound) / loss``; 0 for a loss of 0.
        status: of the solver, in its own words.
    """

    choice: tuple[int, ...]
    loss: float
    bound: float
    gap: float
    status: str


def solve(losses: Sequence[Sequence[float]], limits: Sequence[Limit]) -> Solution:
    """The choice with the least loss.

    Items may have different numbers of choices. Losses are not negative; a choice of infinite loss is never taken.

    Raises:
        BitlowerError: no choice keeps within the limits.
        CheckError: the solver gives up.
    """
    known = greedy(losses, limits)
    ceiling = total(losses, known) if known is not None else np.inf
    kept = [
        (item, choice)
        for item, row in enumerate(losses)
        for choice in range(len(row))
        if np.isfinite(row[choice]) and row[choice] <= ceiling and not _dominated(losses, limits, item, choice)
    ]
    if len({item for item, _ in kept}) < len(losses):
        raise _infeasible(limits)
    cuts: list[set[tuple[int, int]]] = []
    while len(cuts) < _CUTS:
        found = _milp(losses, limits, kept, cuts, ceiling)
        if found is None:
            raise _infeasible(limits)
        choice, bound, status = found
        if all(spent(limit, choice) <= limit.most for limit in limits):
            loss = total(losses, choice)
            bound = min(max(bound, 0.0), loss)
            return Solution(choice, loss, bound, (loss - bound) / loss if loss else 0.0, status)
        cuts.append(set(enumerate(choice)))  # over a limit by less than the solver's tolerance
    raise CheckError("the solver finds no choice that keeps within the limits exactly")


def total(losses: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    """The sum of the chosen losses."""
    return float(sum(row[c] for row, c in zip(losses, choice, strict=True)))


def spent(limit: Limit, choice: Sequence[int]) -> int:
    """The sum of the chosen costs."""
    return sum(row[c] for row, c in zip(limit.costs, choice, strict=True))


def greedy(losses: Sequence[Sequence[float]], limits: Sequence[Limit]) -> tuple[int, ...] | None:
    """A choice within the limits by steps: from the least losses, the step that costs least loss for what it saves.

    None if the steps lead nowhere, which does not mean that there is no choice.
    """
    table = _padded(losses, np.inf)
    costs = [_padded(limit.costs, 0) / max(limit.most, 1) for limit in limits]
    rows = np.arange(len(losses))
    choice, finite = table.argmin(1), np.isfinite(table)
    if not finite[rows, choice].all():
        return None
    table = np.where(finite, table, 0)
    for _ in range(2 * table.size + 1):  # steps can go round in circles where limits pull apart
        over = [c for c, limit in zip(costs, limits, strict=True) if spent(limit, choice.tolist()) > limit.most]
        if not over:
            return tuple(choice.tolist())
        needed = np.sum(over, axis=0)
        saved = needed[rows, choice][:, None] - needed
        price = np.full(table.shape, np.inf)
        np.divide(table - table[rows, choice][:, None], saved, out=price, where=(saved > 0) & finite)
        item, other = divmod(int(price.argmin()), table.shape[1])
        if not np.isfinite(price[item, other]):
            return None
        choice[item] = other
    return None


def _padded(rows: Sequence[Sequence[float]], fill: float) -> Floats:
    """Rows of unequal lengths as a matrix."""
    table = np.full((len(rows), max(map(len, rows))), fill)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


def _dominated(losses: Sequence[Sequence[float]], limits: Sequence[Limit], item: int, choice: int) -> bool:
    """Whether another choice of the item has no larger loss and no larger cost."""
    row = losses[item]
    for other in range(len(row)):
        if other == choice or row[other] > row[choice]:
            continue
        if any(limit.costs[item][other] > limit.costs[item][choice] for limit in limits):
            continue
        equal = row[other] == row[choice] and all(lim.costs[item][other] == lim.costs[item][choice] for lim in limits)
        if not equal or other < choice:
            return True
    return False


def _milp(
    losses: Sequence[Sequence[float]],
    limits: Sequence[Limit],
    kept: Sequence[tuple[int, int]],
    cuts: Sequence[set[tuple[int, int]]],
    ceiling: float,
) -> tuple[tuple[int, ...], float, str] | None:
    """The solver's choice, its bound on the loss, and its status; None if there is no choice.

    Losses are scaled so that the known choice has :data:`_SCALE`, for the solver's tolerances are absolute.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    values = np.array([losses[item][choice] for item, choice in kept])
    largest = ceiling if np.isfinite(ceiling) else values.max()
    scale = _SCALE / max(largest, 1e-100)
    items = np.array([item for item, _ in kept])
    once = csr_array((np.ones(len(kept)), (items, np.arange(len(kept)))), shape=(len(losses), len(kept)))
    constraints = [LinearConstraint(once, 1, 1)]
    for limit in limits:
        costs = np.array([float(limit.costs[item][choice]) for item, choice in kept])
        unit = max(costs.max() / _SCALE, 1e-300)
        constraints.append(LinearConstraint(costs[None] / unit, -np.inf, limit.most / unit))
    for cut in cuts:
        inside = np.array([[float(pair in cut) for pair in kept]])
        constraints.append(LinearConstraint(inside, -np.inf, len(losses) - 1))
    with _no_chatter():
        result: Any = milp(
            values * scale, integrality=np.ones(len(kept), dtype=np.int64), bounds=Bounds(0, 1),
            constraints=constraints, options={"mip_rel_gap": _GAP},
        )  # fmt: skip
    if result.status == 2:
        return None
    if result.x is None:
        raise CheckError(f"the solver gives up: {result.message}")
    taken = dict(pair for pair, x in zip(kept, result.x, strict=True) if x > 0.5)
    return tuple(taken[item] for item in range(len(losses))), float(result.mip_dual_bound) / scale, str(result.message)


def _infeasible(limits: Sequence[Limit]) -> BitlowerError:
    names = " and ".join(f"{limit.name} of at most {limit.most}" for limit in limits)
    return BitlowerError(f"no assignment has {names}", hint="raise the budget, or allow fewer bits")


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Keep off what some versions of HiGHS print to the process's standard output whatever their options say."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
