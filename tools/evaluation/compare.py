"""Two models on the same data: both figures, their difference, and whether it is more than chance."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bitlower.ir import BitlowerError
from bitlower.tools.evaluation.figures import Figures
from bitlower.tools.evaluation.intervals import Interval, differences

LOWER = frozenset({"wer", "cer", "cross_entropy", "pseudo_perplexity", "perplexity"})
"""Metrics of which less is better."""


class Measured(Protocol):
    """What an evaluation measured."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """By name."""
        ...

    @property
    def figures(self) -> Figures | None:
        """The same as functions of the data."""
        ...


@dataclass(frozen=True)
class Difference:
    """A figure of two models.

    Args:
        first: of the one.
        second: of the other.
        interval: of first minus second, paired; None where it is not defined.
        lower: whether less is better.
    """

    first: float
    second: float
    interval: Interval | None
    lower: bool

    @property
    def difference(self) -> float:
        """First minus second."""
        return self.first - self.second

    @property
    def above_noise(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]

    @property
    def verdict(self) -> str:
        """``better`` or ``worse``, said of the first, ``within noise``, or ``equal``."""
        if self.interval is None or math.isnan(self.difference):
            return "not known"
        if self.interval == (0.0, 0.0):
            return "equal"
        if not self.above_noise:
            return "within noise"
        return "better" if (self.difference < 0) == self.lower else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the difference and its interval in the unit of the metric."""
        interval = None if self.interval is None else [round(end, 4) for end in self.interval]
        known = None if math.isnan(self.difference) else round(self.difference, 4)
        return {
            "difference": known,
            "interval": interval,
            "above_noise": self.above_noise,
            "verdict": self.verdict,
        }


def compare(
    first: Measured, second: Measured, *, seed: int = 0, lower: Collection[str] = LOWER
) -> dict[str, Difference]:
    """Each figure of ``first`` against that of ``second``, with the paired interval of the difference.

    Args:
        first: what was measured of the one.
        second: of the other, by the same data and options.
        seed: of the resamples.
        lower: metrics of which less is better.

    Raises:
        BitlowerError: there is nothing to compare, or the models read the data as different units.
    """
    if not first.metrics.keys() & second.metrics.keys():
        raise BitlowerError("there is no figure to compare", hint="give --data; samples alone are not compared")
    ranges = (
        {} if first.figures is None or second.figures is None else differences(first.figures, second.figures, seed=seed)
    )
    return {
        name: Difference(value, second.metrics[name], ranges.get(name), name in lower)
        for name, value in first.metrics.items()
        if name in second.metrics
    }
