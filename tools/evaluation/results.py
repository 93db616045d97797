"""What an evaluation measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from bitlower.tools.evaluation.figures import Figures
from bitlower.tools.evaluation.intervals import Interval, cautions, intervals


@dataclass(frozen=True)
class Evaluation:
    """What was measured over ``samples`` rows of the data file.

    Args:
        target: the model or artifact.
        task: what was asked.
        data: the file.
        samples: rows, sentences, questions or texts of it.
        metrics: in percent, but for those in ``units``.
        notes: what of the data did not count or how it was read, a line each.
        units: of metrics that are not in percent; empty for a plain number.
        figures: the metrics as functions of the data, for intervals.
        intervals: of each metric, in its unit: where it lies for other data of the kind, with 95 % confidence.
        cautions: what is to be said of the intervals, a line each.
    """

    target: str
    task: str
    data: str
    samples: int
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    units: dict[str, str] = field(default_factory=dict)
    figures: Figures | None = field(default=None, compare=False, repr=False)
    intervals: dict[str, Interval] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()

    def with_intervals(self, *, seed: int) -> Evaluation:
        """The same with intervals, and what is to be said of them.

        Args:
            seed: of the resamples.
        """
        if self.figures is None:
            return self
        measured = intervals(self.figures, seed=seed)
        return replace(self, intervals=measured, cautions=cautions(self.figures, measured))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        metrics = {name: round(value, 4) for name, value in self.metrics.items()}
        head = {"target": self.target, "task": self.task, "data": self.data, "samples": self.samples}
        ranges = {name: [round(end, 4) for end in ends] for name, ends in self.intervals.items()}
        return {**head, **metrics, "intervals": ranges, "notes": [*self.notes, *self.cautions]}
