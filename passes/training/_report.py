"""What a pass that trains leaves: the curve of its losses, and what became of ranges and codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitlower.ir.charts import BarChart, Chart, LineChart
from bitlower.passes._machinery.report import Record, few


@dataclass(frozen=True)
class CurvePoint:
    """The losses after some steps.

    Args:
        step: steps that were done.
        loss: mean over the batches since the last point; None at the start.
        held_out: on held-out data; None without any.
        terms: each loss by itself on held-out data (or on the batches), before its weight.
        rate: what learning rates were multiplied by.
    """

    step: int
    loss: float | None
    held_out: float | None
    terms: dict[str, float]
    rate: float


@dataclass(frozen=True)
class QuantizerRow:
    """What became of one quantizer.

    Args:
        quantizer: its name.
        tensor: what it rounds.
        drift: the largest change of a scale, as a share of its first value.
        dead: scales that fell to the floor.
        changed: the share of a weight's codes that are others than at the start; None for activations.
        flipped: the share that changed in the last tenth of the steps: weights that oscillate between two codes.
        clipped: the share of a weight's values outside its range.
    """

    quantizer: str
    tensor: str
    drift: float
    dead: int
    changed: float | None = None
    flipped: float | None = None
    clipped: float | None = None


@dataclass(frozen=True)
class TrainReport(Record):
    """How a training went.

    Args:
        steps: optimizer steps that were done.
        best_step: after which the held-out loss was least; what the program has now. 0: it is as it was.
        learned: how many numbers learn.
        curve: the losses, in order.
        quantizers: those with stored scales, in order of the graph.
        notes: what was unusual.
    """

    steps: int
    best_step: int
    learned: int
    curve: tuple[CurvePoint, ...]
    quantizers: tuple[QuantizerRow, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """How far it came."""
        first, best = self.curve[0], next(point for point in self.curve if point.step == self.best_step)
        text = f"{self.steps} steps, {self.learned:,} numbers learned; the best was step {self.best_step}"
        if best.held_out is not None and first.held_out is not None:
            text += f"; held-out loss {first.held_out:.5g} → {best.held_out:.5g}"
        return text

    def details(self) -> Iterable[str]:
        """What became of weights, and what was unusual."""
        weights = [row for row in self.quantizers if row.changed is not None]
        if weights:
            worst = max(weights, key=lambda row: row.flipped or 0.0)
            yield (
                f"codes that changed {_mean(row.changed for row in weights):.2%}, "
                f"in the last tenth {_mean(row.flipped for row in weights):.2%} (most in {worst.tensor})"
            )
        dead = [row.quantizer for row in self.quantizers if row.dead]
        if dead:
            yield f"{len(dead)} quantizers have scales that fell to nothing: {', '.join(dead[:5])}"
        yield from few(self.notes)

    def charts(self) -> Iterable[Chart]:
        """The losses over the steps, and what became of scales and codes, tensor by tensor."""
        lines = {name: self._points(key) for name, key in (("training", "loss"), ("held out", "held_out"))}
        best = [point for point in self._points("held_out") if point[0] == self.best_step]
        shown = {name: points for name, points in lines.items() if points}
        yield LineChart("Losses over the steps", "step", "loss", shown, "training", True, next(iter(best), None))
        if self.quantizers:
            drift = tuple(row.drift for row in self.quantizers)
            names = tuple(row.tensor for row in self.quantizers)
            bars = {"largest change of a scale": drift}
            yield BarChart("Drift of ranges", "share of the first scale", names, bars, "training")
        if weights := [row for row in self.quantizers if row.changed is not None]:
            changed, flipped = (tuple(getattr(row, key) for row in weights) for key in ("changed", "flipped"))
            names = tuple(row.tensor for row in weights)
            bars = {"changed": changed, "flipped in the last tenth of the steps": flipped}
            yield BarChart("Codes that changed", "share of codes", names, bars, "training")

    def _points(self, key: str) -> tuple[tuple[float, float], ...]:
        """A loss over the steps, where it is known."""
        known = (point for point in self.curve if getattr(point, key) is not None)
        return tuple((float(point.step), float(getattr(point, key))) for point in known)


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
