"""The multiple-choice knapsack: one choice for each item, the least sum of losses within limits on sums of costs.

It is solved exactly as a mixed-integer linear program by HiGHS (``scipy.optimize.milp``), which proves how far the
solution can be from the optimum. Costs are whole numbers and limits hold exactly.

Two items may decide a cost together (:class:`Pair`). With x[i, a] = 1 where item i has choice a, the products of two of
these are variables y[a, b] ≥ 0 with ``Σ_b y[a, b] = x[i, a]`` and ``Σ_a y[a, b] = x[j, b]``: where x is whole, y can be
nothing but the product. What one item pays whatever the other does is taken out first, and choices whose costs then
are equal share a row of y: mostly few are left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlower.ir import BitlowerError, CheckError

Floats = NDArray[np.float64]
_GAP = 1e-9
"""Relative: below it the solver counts a choice as the best."""
_SCALE = 1e3
"""The largest number that the solver sees, whose tolerances are absolute (1e-6)."""
_CUTS = 100
"""Choices within the solver's tolerance that break a limit: each is forbidden, and the next asked for."""


@dataclass(frozen=True)
class Pair:
    """What two items cost together.

    Args:
        first: an item.
        second: another one; no two pairs of a limit have the same two items.
        costs: ``costs[a][b]``, whole numbers from 0, with choice a of ``first`` and b of ``second``.
    """

    first: int
    second: int
    costs: tuple[tuple[int, ...], ...]

    def turned(self) -> Pair:
        """The same, seen from the other item."""
        return Pair(self.second, self.first, tuple(zip(*self.costs, strict=True)))


@dataclass(frozen=True)
class Limit:
    """A bound on a sum of costs.

    Args:
        name: for messages.
        costs: ``costs[i][c]`` is that of item i's choice c, a whole number from 0.
        most: the bound.
        pairs: costs that two items decide together.
    """

    name: str
    costs: tuple[tuple[int, ...], ...]
    most: int
    pairs: tuple[Pair, ...] = ()

    @property
    def ceiling(self) -> int:
        """No choice spends more."""
        return sum(map(max, self.costs)) + sum(max(map(max, pair.costs)) for pair in self.pairs)


@dataclass(frozen=True)
class KnapsackSolution:
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


def solve(losses: Sequence[Sequence[float]], limits: Sequence[Limit]) -> KnapsackSolution:
    """The choice with the least loss.

    Items may have different numbers of choices. Losses are not negative; a choice of infinite loss is never taken.

    Raises:
        BitlowerError: no choice keeps within the limits.
        CheckError: the solver gives up.
    """
    known = greedy(losses, limits)
    ceiling = total(losses, known) if known is not None else np.inf
    dominance = _Dominance(losses, limits)
    candidates = [
        (item, choice)
        for item, row in enumerate(losses)
        for choice in range(len(row))
        if np.isfinite(row[choice]) and row[choice] <= ceiling and not dominance.covers(item, choice)
    ]
    values = {column: losses[item][choice] for column, (item, choice) in enumerate(candidates)}
    program = _Program(len(losses), candidates, limits)
    choice, bound, status = program.solve(values, ceiling if np.isfinite(ceiling) else max(values.values(), default=0))
    loss = total(losses, choice)
    bound = min(max(bound, 0.0), loss)
    return KnapsackSolution(choice, loss, bound, (loss - bound) / loss if loss else 0.0, status)


def least(limit: Limit, others: Sequence[Limit]) -> int:
    """The least that any choice within ``others`` spends of ``limit``, to the solver's tolerance.

    Raises:
        BitlowerError: no choice keeps within the others.
        CheckError: the solver gives up.
    """
    candidates = [(item, choice) for item, row in enumerate(limit.costs) for choice in range(len(row))]
    program = _Program(len(limit.costs), candidates, others)
    values = program.coefficients(limit)
    return spent(limit, program.solve(values, max(values.values(), default=0))[0])


def total(losses: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    """The sum of the chosen losses."""
    return float(sum(row[c] for row, c in zip(losses, choice, strict=True)))


def spent(limit: Limit, choice: Sequence[int]) -> int:
    """The sum of the chosen costs."""
    alone = sum(row[c] for row, c in zip(limit.costs, choice, strict=True))
    return alone + sum(pair.costs[choice[pair.first]][choice[pair.second]] for pair in limit.pairs)


def greedy(losses: Sequence[Sequence[float]], limits: Sequence[Limit]) -> tuple[int, ...] | None:
    """A choice within the limits by steps: from the least losses, the step that costs least loss for what it saves.

    A step changes one item, or two that decide a cost together. None if the steps lead nowhere, which does not mean
    that there is no choice.
    """
    table = _padded(losses, np.inf)
    tables = [_CostTable(limit, table.shape[1]) for limit in limits]
    rows = np.arange(len(losses))
    choice, finite = table.argmin(1), np.isfinite(table)
    if not finite[rows, choice].all():
        return None
    for _ in range(2 * table.size + 1):  # steps can go round in circles where limits pull apart
        over = [t for t, limit in zip(tables, limits, strict=True) if spent(limit, choice.tolist()) > limit.most]
        if not over:
            return tuple(choice.tolist())
        lost = np.where(finite, table, np.inf) - table[rows, choice][:, None]
        saved = np.sum([t.saved(choice) for t in over], axis=0)
        best, changes = _cheapest(lost, saved, [(item,) for item in range(len(rows))])
        for t in over:
            if t.pairs:
                together = lost[t.first][:, :, None] + lost[t.second][:, None, :]
                other = _cheapest(together, t.saved_together(choice), list(zip(t.first, t.second, strict=True)))
                best, changes = min((best, changes), other, key=lambda candidate: candidate[0])
        if not np.isfinite(best):
            return None
        for item, new in changes:
            choice[item] = new
    return None


class _CostTable:
    """A limit's costs as shares of its bound, in matrices that all items fit in: what :func:`greedy` goes by."""

    def __init__(self, limit: Limit, width: int) -> None:
        unit = max(limit.most, 1)
        self._costs = _padded(limit.costs, 0, width) / unit
        self._rows = np.arange(len(limit.costs))
        self.pairs = len(limit.pairs)
        self.first = np.array([pair.first for pair in limit.pairs], dtype=np.int64)
        self.second = np.array([pair.second for pair in limit.pairs], dtype=np.int64)
        self._joint = np.zeros((self.pairs, width, width))
        for table, pair in zip(self._joint, limit.pairs, strict=True):
            table[: len(pair.costs), : len(pair.costs[0])] = np.array(pair.costs) / unit

    def saved(self, choice: NDArray[np.int64]) -> Floats:
        """What each choice of an item saves, all others as they are."""
        costs = self._beside(choice)
        return costs[self._rows, choice][:, None] - costs

    def saved_together(self, choice: NDArray[np.int64]) -> Floats:
        """What each two choices of the items of a pair save."""
        costs, pair = self._beside(choice), np.arange(self.pairs)
        now, other = choice[self.first], choice[self.second]
        alone = costs[self.first] - self._joint[pair, :, other], costs[self.second] - self._joint[pair, now]
        together = alone[0][:, :, None] + alone[1][:, None, :] + self._joint
        return together[pair, now, other][:, None, None] - together

    def _beside(self, choice: NDArray[np.int64]) -> Floats:
        """What each choice of an item costs beside the choices of all others."""
        costs, pair = self._costs.copy(), np.arange(self.pairs)
        np.add.at(costs, self.first, self._joint[pair, :, choice[self.second]])
        np.add.at(costs, self.second, self._joint[pair, choice[self.first]])
        return costs


def _cheapest(lost: Floats, saved: Floats, items: Sequence[tuple[int, ...]]) -> tuple[float, list[tuple[int, int]]]:
    """The least loss for what is saved, and the new choices of the items (one of ``items`` a row) that it takes."""
    price = np.full(lost.shape, np.inf)
    np.divide(lost, saved, out=price, where=(saved > 0) & np.isfinite(lost))
    row, *new = (int(index) for index in np.unravel_index(price.argmin(), price.shape))
    return float(price[row, *new]), list(zip(items[row], new, strict=True))


def _padded(rows: Sequence[Sequence[float]], fill: float, width: int = 0) -> Floats:
    """Rows of unequal lengths as a matrix."""
    table = np.full((len(rows), max(width, *map(len, rows))), fill)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table


class _Dominance:
    """Which choices are never needed: another one of the item has no larger loss and no larger cost."""

    def __init__(self, losses: Sequence[Sequence[float]], limits: Sequence[Limit]) -> None:
        self._losses, self._limits = losses, limits
        self._beside: list[list[Pair]] = [[] for _ in losses]
        for pair in (pair for limit in limits for pair in limit.pairs):
            self._beside[pair.first].append(pair)
            self._beside[pair.second].append(pair.turned())

    def covers(self, item: int, choice: int) -> bool:
        """Whether ``choice`` of ``item`` is never needed."""
        mine = self._all(item, choice)
        for other in range(len(self._losses[item])):
            theirs = self._all(item, other)
            no_worse = other != choice and all(t <= m for t, m in zip(theirs, mine, strict=True))
            if no_worse and (theirs != mine or other < choice):
                return True
        return False

    def _all(self, item: int, choice: int) -> list[float]:
        """Loss and costs of a choice, beside each choice of the items that decide costs with it."""
        alone = [self._losses[item][choice], *(limit.costs[item][choice] for limit in self._limits)]
        return alone + [cost for pair in self._beside[item] for cost in pair.costs[choice]]


class _Program:
    """The mixed-integer program: the ``candidates`` are variables, 0 or 1, and the products of pairs come behind.

    Raises:
        BitlowerError: an item has no choice.
    """

    def __init__(self, items: int, candidates: Sequence[tuple[int, int]], limits: Sequence[Limit]) -> None:
        self._items, self._candidates, self._limits = items, list(candidates), limits
        self._column = {pair: column for column, pair in enumerate(candidates)}
        self._choices: list[list[int]] = [[] for _ in range(items)]
        for item, choice in candidates:
            self._choices[item].append(choice)
        if not all(self._choices):
            raise _infeasible(limits)
        self._columns = len(candidates)
        self._rows: list[tuple[dict[int, float], float, float]] = []
        for item, choices in enumerate(self._choices):
            self._rows.append(({self._column[item, choice]: 1.0 for choice in choices}, 1, 1))
        for limit in limits:
            row = self.coefficients(limit)
            unit = max(max(row.values(), default=0) / _SCALE, 1e-300)
            self._rows.append(({column: cost / unit for column, cost in row.items()}, -np.inf, limit.most / unit))

    def coefficients(self, limit: Limit) -> dict[int, float]:
        """What each variable costs; the products that it takes become variables."""
        row = {column: float(limit.costs[item][choice]) for column, (item, choice) in enumerate(self._candidates)}
        for pair in limit.pairs:
            for column, cost in self._products(pair).items():
                row[column] = row.get(column, 0.0) + cost
        return row

    def _products(self, pair: Pair) -> dict[int, float]:
        """What a pair's variables cost: as much of it as each item pays whatever the other does, and their products."""
        sides = [(item, self._choices[item]) for item in (pair.first, pair.second)]
        table = np.array([[pair.costs[a][b] for b in sides[1][1]] for a in sides[0][1]])
        row: dict[int, float] = {}
        for axis, (item, choices) in enumerate(sides):
            alone = table.min(1 - axis, keepdims=True)
            table = table - alone
            row |= {
                self._column[item, choice]: cost for choice, cost in zip(choices, alone.flatten().tolist(), strict=True)
            }
        if not table.any():
            return row
        first, second = _alike(table), _alike(table.T)
        columns = self._columns + np.arange(len(first) * len(second)).reshape(len(first), len(second))
        self._columns += columns.size
        for (item, choices), classes, products in zip(sides, (first, second), (columns, columns.T), strict=True):
            for places, variables in zip(classes, products.tolist(), strict=True):
                choice_terms = {self._column[item, choices[place]]: -1.0 for place in places}
                self._rows.append((choice_terms | dict.fromkeys(variables, 1.0), 0, 0))
        reduced = table[[places[0] for places in first]][:, [places[0] for places in second]]
        return row | dict(zip(columns.flatten().tolist(), reduced.flatten().tolist(), strict=True))

    def solve(self, values: Mapping[int, float], largest: float) -> tuple[tuple[int, ...], float, str]:
        """The choice of least value, the bound on it, and the solver's words; limits hold exactly.

        Values are scaled so that ``largest`` has :data:`_SCALE`, for the solver's tolerances are absolute.

        Raises:
            BitlowerError: no choice keeps within the limits.
            CheckError: the solver gives up.
        """
        scale = _SCALE / max(largest, 1e-100)
        for _ in range(_CUTS):
            result = self._milp(values, scale)
            if result.status == 2:
                raise _infeasible(self._limits)
            if result.x is None:
                raise CheckError(f"the solver gives up: {result.message}")
            choice_by_item = dict(pair for pair, x in zip(self._candidates, result.x, strict=False) if x > 0.5)
            choice = tuple(choice_by_item[item] for item in range(self._items))
            if all(spent(limit, choice) <= limit.most for limit in self._limits):
                return choice, float(result.mip_dual_bound) / scale, str(result.message)
            cut = {self._column[pair]: 1.0 for pair in enumerate(choice)}  # over by less than the solver's tolerance
            self._rows.append((cut, -np.inf, self._items - 1))
        raise CheckError("the solver finds no choice that keeps within the limits exactly")

    def _milp(self, values: Mapping[int, float], scale: float) -> Any:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        entries = [
            (row, column, value) for row, (cells, _, _) in enumerate(self._rows) for column, value in cells.items()
        ]
        rows, columns, cells = (np.array(part) for part in zip(*entries, strict=True))
        matrix = csr_array((cells, (rows, columns)), shape=(len(self._rows), self._columns))
        low, high = (np.array([row[side] for row in self._rows]) for side in (1, 2))
        objective = np.zeros(self._columns)
        objective[list(values)] = np.array(list(values.values())) * scale
        whole = np.arange(self._columns) < len(self._candidates)
        with _no_chatter():
            return milp(
                objective, integrality=whole.astype(np.int64), bounds=Bounds(0, 1),
                constraints=LinearConstraint(matrix, low, high), options={"mip_rel_gap": _GAP},
            )  # fmt: skip


def _alike(table: NDArray[np.int64]) -> list[list[int]]:
    """The rows of ``table``, equal ones together."""
    classes: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(table.tolist()):
        classes.setdefault(tuple(row), []).append(index)
    return list(classes.values())


def _infeasible(limits: Sequence[Limit]) -> BitlowerError:
    names = " and ".join(f"{limit.name} of at most {limit.most}" for limit in limits)
    return BitlowerError(f"no assignment has {names}", hint="raise the budget, or allow fewer bits")


@contextmanager
def _no_chatter() -> Iterator[None]:
    """Keep off what some versions of HiGHS print to the process's standard output whatever their options say."""
    sys.stdout.flush()
    stdout_copy, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(stdout_copy, 1)
        os.close(stdout_copy)
        os.close(nowhere)
