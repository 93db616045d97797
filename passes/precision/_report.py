"""What ``assign-precision`` leaves: plain data, the tables that people read, and the Pareto front as a chart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitlower.ir.charts import Chart, LineChart
from bitlower.passes._machinery.report import Record, Table

TIME = "time"
"""The budget whose use is calculated, and not counted."""


@dataclass(frozen=True)
class PrecisionRow:
    """Quantizers that got the same bits.

    Args:
        tensors: what they round.
        role: their role.
        before: the bits that they had.
        bits: those that they got.
        loss: with these alone on, with these bits; None for a fixed set.
    """

    tensors: tuple[str, ...]
    role: str
    before: int
    bits: int
    loss: float | None


@dataclass(frozen=True)
class BudgetUse:
    """A budget: its name, the most that was allowed, and what was used, in the budget's own unit."""

    name: str
    most: float
    used: float

    @property
    def label(self) -> str:
        """The name, and how the number came to be where it was not counted."""
        return f"{self.name}, estimated by calculation" if self.name == TIME else self.name


@dataclass(frozen=True)
class TimeEstimate:
    """What the linears take, calculated (:mod:`bitlower.passes.precision._roofline`): nothing was measured.

    Args:
        target: its name.
        rows: that each linear reads.
        before_us: microseconds, with the bits that the scheme gives.
        after_us: with those that were chosen.
    """

    target: str
    rows: int
    before_us: float
    after_us: float


@dataclass(frozen=True)
class FrontPoint:
    """The best assignment under one budget: what it may use, what it uses, its losses (measured where asked for)."""

    budget: float
    used: float
    predicted: float
    measured: float | None


@dataclass(frozen=True)
class Round:
    """A step of refinement: how many items it changed, the predicted and the measured loss, and if it was accepted."""

    changed: int
    predicted: float
    measured: float
    accepted: bool


@dataclass(frozen=True)
class Optimum:
    """The assignment with the least sum of losses, and the proof.

    Args:
        predicted: the sum of the losses of the chosen bits.
        bound: no assignment within the budgets has a smaller one.
        gap: ``(predicted − bound) / predicted``.
        status: the solver's own words.
        measured: the loss with this assignment.
        greedy: the predicted loss of a greedy assignment; None where it finds none.
    """

    predicted: float
    bound: float
    gap: float
    status: str
    measured: float
    greedy: float | None


@dataclass(frozen=True)
class PrecisionReport(Record):
    """Bits for each quantizer.

    Args:
        rows: in graph order.
        measure: of the losses; empty for a fixed set, as is all that follows.
        budgets: in the order of the parameters.
        optimum: of the sum of losses.
        rounds: of refinement.
        measured: the loss with the assignment that was made.
        front: the best assignments under other values of the first budget.
        trials: that were run.
        time: of the linears, where it is a budget.
    """

    rows: tuple[PrecisionRow, ...]
    measure: str = ""
    budgets: tuple[BudgetUse, ...] = ()
    optimum: Optimum | None = None
    rounds: tuple[Round, ...] = ()
    measured: float | None = None
    front: tuple[FrontPoint, ...] = ()
    trials: int = 0
    time: TimeEstimate | None = None

    @property
    def _axis(self) -> str:
        """What the front goes along."""
        return self.budgets[0].label if self.budgets else "budget"

    def table(self) -> Table:
        """One row for quantizers that keep together, in graph order."""
        return ("tensors", "role", "before", "bits", "loss alone"), [
            (", ".join(row.tensors), row.role, str(row.before), str(row.bits), _number(row.loss)) for row in self.rows
        ]

    def front_table(self) -> Table:
        """One row a point of the front."""
        return (self._axis, "used", "predicted loss", "measured loss"), [
            (f"{p.budget:.6g}", f"{p.used:.6g}", _number(p.predicted), _number(p.measured)) for p in self.front
        ]

    def summary(self) -> str:
        """How many quantizers got other bits."""
        changed = sum(len(row.tensors) for row in self.rows if row.bits != row.before)
        return f"{changed} of {sum(len(row.tensors) for row in self.rows)} quantizers got other bits"

    def details(self) -> Iterable[str]:
        """The budgets, the time by calculation, and how near the optimum is."""
        for budget in self.budgets:
            yield f"{budget.label}: {budget.used:.6g} of {budget.most:.6g}"
        if self.time:
            what = f"the linears on {self.time.target}, {self.time.rows} rows"
            yield f"{what}: {self.time.before_us:.4g} → {self.time.after_us:.4g} µs by calculation"
        if self.optimum:
            optimum = self.optimum
            yield (
                f"predicted loss {optimum.predicted:.4g}, at most {optimum.gap:.2g} of it above the optimum; "
                f"measured {_number(self.measured)}"
            )

    def charts(self) -> Iterable[Chart]:
        """The front: losses over the budget, with the assignment that was made."""
        if not self.front:
            return
        lines = {
            "predicted": tuple((point.budget, point.predicted) for point in self.front),
            "measured": tuple((point.budget, point.measured) for point in self.front if point.measured is not None),
        }
        shown = {name: points for name, points in lines.items() if points}
        loss = self.measured if self.measured is not None else self.optimum.predicted if self.optimum else None
        chosen = (self.budgets[0].most, loss) if self.budgets and loss is not None else None
        yield LineChart("Loss under a budget", self._axis, f"loss ({self.measure})", shown, "front", True, chosen)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
