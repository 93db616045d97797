"""How much of a figure is chance: intervals by the bootstrap over the units of the data.

Units are drawn with replacement, as many as there are, and the figure is measured on each such resample; the interval
spans the middle 95 % of what comes out (the percentile interval; Efron and Tibshirani, 1993, section 13.3). Two models
are measured on the same resamples, so that what is hard for both cancels in the difference (paired; Koehn, 2004).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np

from bitlower.ir import BitlowerError
from bitlower.tools.evaluation.figures import Figures, Floats

Interval = tuple[float, float]
CONFIDENCE = 0.95
"""Of all intervals."""
RESAMPLES = 2000
"""How many are drawn; ends of an interval come out within some hundredths of its width."""
FEW = 20
"""Below so many units, intervals by the bootstrap come out too narrow, and a note says so."""
_CELLS = 2**21
"""Of counts that are in memory at once."""


def intervals(figures: Figures, *, seed: int = 0) -> dict[str, Interval]:
    """The interval of each figure, in its unit; none for one that is not defined on resamples.

    Args:
        figures: what was measured.
        seed: of the resamples.
    """
    return _middles(_resampled(figures, seed))


def differences(first: Figures, second: Figures, *, seed: int = 0) -> dict[str, Interval]:
    """The interval of first minus second, of each figure that both have, over the same resamples.

    Args:
        first: of one model.
        second: of another, on the same data.
        seed: of the resamples.

    Raises:
        BitlowerError: they were not measured on the same units.
    """
    if (first.units, first.fingerprint) != (second.units, second.fingerprint):
        raise BitlowerError(
            f"the two models read the data as different {first.unit}, so that no figure of one compares with the "
            "other's",
            hint="compare models that have the same tokenizer",
        )
    a, b = _resampled(first, seed), _resampled(second, seed)
    return _middles({name: _difference(a[name], b[name]) for name in a if name in b})


def cautions(figures: Figures, measured: Mapping[str, Interval]) -> tuple[str, ...]:
    """What is to be said of intervals that are too narrow: too few units, or units that are all alike."""
    said = []
    if figures.units < FEW:
        said.append(f"{figures.units} {figures.unit} are few: the true intervals are wider than these")
    alike = [name for name, (low, high) in measured.items() if low == high]
    if alike:
        share = 100 * min(1.0, 3 / figures.units)
        said.append(
            f"{', '.join(alike)}: no width, since all {figures.units} {figures.unit} give the same; of others up to "
            f"{share:.2g} % may differ (3 over their number)"
        )
    return tuple(said)


def _difference(a: Floats, b: Floats) -> Floats:
    with np.errstate(invalid="ignore"):  # two infinite perplexities
        return a - b


def _resampled(figures: Figures, seed: int) -> dict[str, Floats]:
    """Each figure on all resamples, ``[RESAMPLES]``."""
    parts: dict[str, list[Floats]] = {name: [] for name in figures.by_name}
    for counts in _resamples(figures.units, seed):
        for name, figure in figures.by_name.items():
            parts[name].append(figure(counts))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _resamples(units: int, seed: int) -> Iterator[Floats]:
    """How often each unit is drawn, ``[some, units]``, for all resamples."""
    digest = hashlib.sha256(f"{seed}/bootstrap".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    rows = max(1, _CELLS // units)
    for first in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - first)
        drawn = generator.integers(0, units, (count, units)) + units * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units).astype(np.float64)


def _middles(values: Mapping[str, Floats]) -> dict[str, Interval]:
    middles = {name: _middle(value) for name, value in values.items()}
    return {name: interval for name, interval in middles.items() if interval is not None}


def _middle(values: Floats) -> Interval | None:
    """What spans the middle of the values that are defined."""
    known = values[~np.isnan(values)]
    if not known.size:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, (tail, 1 - tail), method="inverted_cdf")  # infinite values are not interpolated
    return float(low), float(high)
