"""The search of ``assign-precision``: what each quantizer costs at each width, solving, refining, the front."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from bitlower.ir import BitlowerError, Program
from bitlower.passes._machinery.base import Context
from bitlower.passes.precision._items import (
    Item,
    calibrate_with,
    find_items,
    float_bytes,
    is_weight,
    roundings,
    set_width,
)
from bitlower.passes.precision._knapsack import KnapsackSolution, Limit, greedy, least, solve, spent, total
from bitlower.passes.precision._measures import Measure
from bitlower.passes.precision._report import (
    TIME,
    BudgetUse,
    FrontPoint,
    Optimum,
    PrecisionReport,
    PrecisionRow,
    Round,
    TimeEstimate,
)
from bitlower.passes.precision._roofline import Roofline, widest
from bitlower.passes.precision._time import time_of
from bitlower.passes.precision._trials import Rounding, Setting, Trials
from bitlower.passes.quantizers.calibrate import Calibrate

Losses = list[list[float]]
Choice = tuple[int, ...]
_WIDE = 16
"""Bits of the activations that MP-PTQ leaves wide (Bondarenko et al. 2021, §4)."""
_TRUST = 0.25
"""The share of the predicted gain that a step of refinement has to bring (a trust region's, Conn et al. 2000, §6.1)."""


@dataclass(frozen=True)
class Budgets:
    """What the assignment may use; None sets no limit.

    Args:
        weight_bits: average bits of all quantized weights.
        model_bytes: of all parameters.
        activation_bits: average bits of activation quantizers.
        share_16: of activation quantizers with 16 bits.
        time: of linears, as a share of what they take with the bits that they have.
    """

    weight_bits: float | None = None
    model_bytes: int | None = None
    activation_bits: float | None = None
    share_16: float | None = None
    time: float | None = None

    def amounts(self) -> dict[str, float]:
        """The budgets that are set, by their names in recipes."""
        values = {f.name.replace("_", "-"): getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def require_none(self, what: str) -> None:
        """Raise BitlowerError if a budget is set beside ``what``."""
        if self.amounts():
            raise BitlowerError(f"assign-precision: {what} takes no budget", hint=f"drop {', '.join(self.amounts())}")

    def require_one(self) -> None:
        """Raise BitlowerError if none is set."""
        if not self.amounts():
            raise BitlowerError(
                "assign-precision needs a budget",
                hint="weight-bits, model-bytes, activation-bits, share-16 or time; or set: paper",
            )

    def widths(self, bits: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """Widths for weights, widths for activations, and whether these may also stay as they are."""
        weights: tuple[int, ...] = ()
        if self.weight_bits is not None or self.model_bytes is not None:
            weights = tuple(bits)
        elif self.time is not None:
            weights = widest(bits, weights=True)
        if self.activation_bits is not None:
            return weights, tuple(bits), False
        if self.share_16 is not None:
            return weights, (_WIDE,), True
        return weights, widest(bits, weights=False) if self.time is not None else (), False


@dataclass(frozen=True)
class Line:
    """A budget as a limit on whole numbers: ``used = (fixed + spent) / unit``."""

    limit: Limit
    unit: float
    fixed: int = 0

    def used(self, choice: Choice) -> float:
        """What ``choice`` uses of the budget."""
        return (self.fixed + spent(self.limit, choice)) / self.unit

    def at(self, most: int) -> Line:
        """The same with another limit."""
        return dataclasses.replace(self, limit=dataclasses.replace(self.limit, most=most))


def lines_of(
    program: Program, items: Sequence[Item], budgets: Budgets, target: Roofline | None = None, rows: int = 1
) -> list[Line]:
    """The budgets as limits; that of time is on ``rows`` rows on ``target``.

    Raises:
        BitlowerError: what is not chosen alone takes more than the whole may.
    """
    count = sum(not is_weight(node) for node, _ in program.quantizers())
    weights = sum(item.bits_cost(1) for item in items if item.is_weight)
    rest = float_bytes(program)
    costs: dict[str, tuple[Callable[[Item, int], int], float, int]] = {
        "weight-bits": (lambda item, width: item.bits_cost(width) if item.is_weight else 0, weights, 0),
        "model-bytes": (lambda item, width: item.bytes_cost(width), 1, rest),
        "activation-bits": (lambda item, width: 0 if item.is_weight else item.bits_cost(width), count, 0),
        "share-16": (lambda item, width: 0 if item.is_weight or width < _WIDE else len(item.nodes), count, 0),
    }
    lines = []
    for name, most in budgets.amounts().items():
        if name == TIME:
            assert target is not None
            time = time_of(program, items, target, rows, most)
            if time.limit.most < 0:
                raise BitlowerError(f"{name} of {most:g} is too little: linears without a choice take more")
            lines.append(Line(time.limit, time.before, time.fixed))
            continue
        cost, unit, fixed = costs[name]
        table = tuple(tuple(cost(item, width) for width in item.widths) for item in items)
        left = math.floor(most * unit + 1e-9 * unit) - fixed
        if left < 0:
            raise BitlowerError(f"{name} of {most:g} is too little: what stays float takes {fixed} bytes")
        lines.append(Line(Limit(name, table, left), unit, fixed))
    return lines


@dataclass(frozen=True)
class SearchOptions:
    """What is searched, and how long; as the fields of `assign-precision` of these names."""

    bits: tuple[int, ...]
    loss: Literal["auto", "kl", "sqnr"]
    outputs: tuple[str, ...]
    batches: int | None
    rounds: int
    front: int
    measured: int
    target: Roofline | None
    rows: int


class Search:
    """Items, their grids, and the trials on a program."""

    def __init__(
        self, program: Program, items: Sequence[Item], options: SearchOptions, calibrate: Calibrate, context: Context
    ) -> None:
        self.program, self.items, self.calibrate = program, items, calibrate
        self.batches, self.track = context.calibration, context.track
        chosen = {node for item in items for node in item.nodes}
        widths = sorted({width for item in items for width in item.widths})
        self.grids: dict[tuple[fx.Node, int], Rounding] = {}
        for width in context.track(widths, "grids"):
            nodes = [node for item in items if width in item.widths for node in item.nodes]
            node_roundings = roundings(program, nodes, width, calibrate, context.calibration)
            self.grids |= {(node, width): rounding for node, rounding in node_roundings.items()}
        rest = [node for node, _ in program.quantizers() if node not in chosen]
        self.fixed = roundings(program, list(filter(is_weight, rest)), None, calibrate, context.calibration)
        measure = Measure.choose(program, options.loss, options.outputs)
        batches = context.calibration[: options.batches]
        self.trials = Trials(program, batches, measure)
        several = len(batches) > 1
        self.near = Trials(program, batches[::2], measure) if several else self.trials
        self.judge = Trials(program, batches[1::2], measure) if several else self.trials

    @property
    def runs(self) -> int:
        """Trials that were run."""
        return sum(trials.runs for trials in {self.trials, self.near, self.judge})

    def settle(self, choice: Choice) -> Setting:
        """The whole program with that assignment, calibrated as it will be: activations see rounded weights."""
        copy = self.program.clone()
        names = {node.name: node for node, _ in copy.quantizers()}
        chosen = {n: i.widths[c] for i, c in zip(self.items, choice, strict=True) for n in i.nodes}
        for node, width in chosen.items():
            set_width(names[node.name], width)
        for node, _ in self.program.quantizers():
            if is_weight(node):
                rounding = self.grids[node, chosen[node]] if node in chosen else self.fixed[node]
                calibrate_with(copy, names[node.name], rounding)
        self.calibrate.run(copy, Context(calibration=self.batches))
        return {node: Rounding.of(copy, names[node.name]) for node, _ in self.program.quantizers()}

    def measure(self, choices: Sequence[Choice]) -> list[float]:
        """The losses of whole assignments."""
        return self.trials.run([self.settle(choice) for choice in choices], baseline=self.trials.off)

    def judged(self, choice: Choice) -> tuple[float, float]:
        """The loss of a whole assignment on all batches, and on those that :meth:`around` does not see."""
        setting = self.settle(choice)
        [loss] = self.trials.run([setting], baseline=self.trials.off)
        return loss, loss if self.judge is self.trials else self.judge.run([setting], baseline=self.judge.off)[0]

    def alone(self) -> Losses:
        """The loss of each item at each of its widths, all else off."""
        settings = [self._one(item, width) for item in self.items for width in item.widths]
        losses = iter(self.trials.run(settings, baseline=self.trials.off, track=self.track, label="one alone"))
        return [[next(losses) for _ in item.widths] for item in self.items]

    def around(self, choice: Choice) -> Losses:
        """The loss of the whole with each item one width up or down, Inf for other widths; on every other batch."""
        near = [
            [c for c in (now - 1, now, now + 1) if 0 <= c < len(item.widths)]
            for item, now in zip(self.items, choice, strict=True)
        ]
        settings = [
            self._one(item, item.widths[c]) if c != now else {}
            for item, now, neighbours in zip(self.items, choice, near, strict=True)
            for c in neighbours
        ]
        losses = iter(self.near.run(settings, baseline=self.settle(choice), track=self.track, label="refinement"))
        table = [[math.inf] * len(item.widths) for item in self.items]
        for row, neighbours in zip(table, near, strict=True):
            for c in neighbours:
                row[c] = next(losses)
        return table

    def _one(self, item: Item, width: int) -> Setting:
        return {node: self.grids[node, width] for node in item.nodes}


def search(
    program: Program, budgets: Budgets, options: SearchOptions, calibrate: Calibrate, context: Context
) -> tuple[list[Item], list[int], PrecisionReport]:
    """The items, the number of each one's width, and the report.

    Raises:
        BitlowerError: there is no calibration data, nothing to choose, or no assignment within the budgets.
    """
    if not context.calibration:
        raise BitlowerError("assign-precision needs calibration data", hint="give calibration batches, or set: paper")
    items = find_items(program, *budgets.widths(options.bits))
    lines = lines_of(program, items, budgets, options.target, options.rows)
    _require_room(lines, budgets)
    limits = [line.limit for line in lines]
    solve([[0.0] * len(item.widths) for item in items], limits)  # before any work
    problem = Search(program, items, options, calibrate, context)
    losses = problem.alone()
    best = solve(losses, limits)
    [measured] = problem.measure([best.choice])
    choice, loss, rounds = refine(problem, best.choice, measured, limits, options.rounds)
    rough = greedy(losses, limits)
    optimum = Optimum(
        best.loss, best.bound, best.gap, best.status, measured, total(losses, rough) if rough is not None else None
    )
    report = PrecisionReport(
        tuple(
            PrecisionRow(item.tensors, item.role, item.before, item.widths[c], row[c])
            for item, row, c in zip(items, losses, choice, strict=True)
        ),
        problem.trials.measure.kind,
        tuple(
            BudgetUse(line.limit.name, most, line.used(choice))
            for line, most in zip(lines, budgets.amounts().values(), strict=True)
        ),
        optimum,
        tuple(rounds),
        loss,
        tuple(_front(problem, losses, lines, options.front, options.measured)),
        problem.runs,
        _time_estimate(lines, options, choice),
    )
    return items, list(choice), report


def _require_room(lines: Sequence[Line], budgets: Budgets) -> None:
    """Raise BitlowerError if a budget bounds nothing, or is too small whatever is chosen."""
    for line, most in zip(lines, budgets.amounts().values(), strict=True):
        name = line.limit.name
        if not line.limit.ceiling:
            raise BitlowerError(f"the program has no quantizer that {name} could bound")
        low = least(line.limit, [])
        if low > line.limit.most:
            fewest = (line.fixed + low) / line.unit
            hint = f"the least is {fewest:.6g}; raise the budget, or allow fewer bits"
            raise BitlowerError(f"no assignment has {name} of at most {most:g}", hint=hint)


def _time_estimate(lines: Sequence[Line], options: SearchOptions, choice: Choice) -> TimeEstimate | None:
    """What linears take before and after, if there is a budget for it."""
    for line in lines:
        if line.limit.name == TIME and options.target is not None:
            before, after = (1e-6 * line.unit * share for share in (1, line.used(choice)))
            return TimeEstimate(options.target.name, options.rows, before, after)
    return None


def refine(
    problem: Search, choice: Choice, loss: float, limits: Sequence[Limit], count: int
) -> tuple[Choice, float, list[Round]]:
    """Solve again on losses measured around ``choice``; fewer changes at a time where the measured loss does not fall.

    The best of many noisy changes are partly luck with the batches that they were measured on, and far from ``choice``
    their sum says little. So a step has to bring :data:`_TRUST` of what was predicted, and to lower the loss on the
    other batches too, where there are several. The loss of what comes out is never above ``loss``.
    """
    rounds: list[Round] = []
    reach = len(choice)
    _, bar = problem.judged(choice) if count else (loss, loss)
    for _ in range(count):
        table = problem.around(choice)
        lowest = [min(row) for row in table]
        excess = [[value - least for value in row] for row, least in zip(table, lowest, strict=True)]
        accepted = False
        while reach and not accepted:
            changes = Limit(
                "changes",
                tuple(tuple(int(c != now) for c in range(len(row))) for row, now in zip(table, choice, strict=True)),
                reach,
            )
            step = solve(excess, [*limits, changes]).choice
            changed = spent(changes, step)
            if not changed:
                return choice, loss, rounds
            predicted = loss + sum(row[c] - row[now] for row, c, now in zip(table, step, choice, strict=True))
            measured, judged = problem.judged(step)
            accepted = measured < loss and loss - measured >= _TRUST * (loss - predicted) and judged < bar
            rounds.append(Round(changed, predicted, measured, accepted))
            if accepted:
                choice, loss, bar = step, measured, judged
            else:
                reach = changed // 2
        if not accepted:
            break
    return choice, loss, rounds


def _front(problem: Search, losses: Losses, lines: Sequence[Line], count: int, measured: int) -> list[FrontPoint]:
    """The best assignments under ``count`` values of the first budget, the others as they are."""
    if count < 1:
        return []
    first, others = lines[0], [line.limit for line in lines[1:]]
    free = solve(losses, [first.at(first.limit.ceiling).limit, *others])
    low, high = least(first.limit, others), spent(first.limit, free.choice)
    values = sorted({round(low + (high - low) * i / max(1, count - 1)) for i in range(count)})
    points: list[tuple[Line, KnapsackSolution]] = []
    for value in values:
        line = first.at(value)
        points.append((line, solve(losses, [line.limit, *others])))
    places = {round(i * (len(points) - 1) / max(1, measured - 1)) for i in range(min(measured, len(points)))}
    found_losses = (
        dict(zip(sorted(places), problem.measure([points[i][1].choice for i in sorted(places)]), strict=True))
        if places
        else {}
    )
    return [
        FrontPoint((line.fixed + line.limit.most) / line.unit, line.used(s.choice), s.loss, found_losses.get(i))
        for i, (line, s) in enumerate(points)
    ]
