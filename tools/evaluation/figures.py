"""Figures as functions of how often each unit of the data counts, so that they can be measured on resampled data.

A unit is what is drawn when data are gathered: a row, a sentence, a question, a text, a window. A :data:`Figure` takes
counts ``[resamples, units]`` and returns ``[resamples]``; counts that are all one give the figure itself. What is a
function of sums over units (a mean, a ratio, F1, BLEU, a correlation) is computed from one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Figure = Callable[[Floats], Floats]
_LARGEST_EXPONENT = 700.0
"""Of an exponential that a float64 can hold; beyond it stands infinity."""


@dataclass(frozen=True)
class Figures:
    """What was measured, by name, over so many units.

    Args:
        units: how many.
        unit: what one is called, in the plural.
        by_name: the figures.
        fingerprint: of what the figures are about; two models are compared where it is the same.
    """

    units: int
    unit: str
    by_name: Mapping[str, Figure]
    fingerprint: str = ""


def of_sums(values: ArrayLike, function: Callable[[Floats], Floats], scale: float = 100.0) -> Figure:
    """``scale`` times a function of sums over the units.

    Args:
        values: ``[units, k]``.
        function: from sums ``[resamples, k]`` to ``[resamples]``.
        scale: 100 for percent.
    """
    matrix = csr_array(np.asarray(values)).astype(np.float64)
    return lambda counts: scale * function(np.asarray((matrix.T @ counts.T).T))


def ratio(numerators: ArrayLike, denominators: ArrayLike, scale: float = 100.0) -> Figure:
    """The sum of ``numerators`` ``[units]`` over that of ``denominators``; NaN where the latter is zero."""
    stacked = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], 1)
    return of_sums(stacked, lambda sums: _divided(sums[:, 0], sums[:, 1]), scale)


def mean(values: ArrayLike, scale: float = 100.0) -> Figure:
    """The mean of ``values``, ``[units]``."""
    column = np.asarray(values, np.float64)
    return ratio(column, np.ones_like(column), scale)


def exponential(figure: Figure) -> Figure:
    """``exp`` of a figure, infinite where no number holds it."""

    def value(counts: Floats) -> Floats:
        exponent = figure(counts)
        powers = np.exp(np.minimum(exponent, _LARGEST_EXPONENT))
        return np.where(exponent < _LARGEST_EXPONENT, powers, np.where(np.isnan(exponent), np.nan, np.inf))

    return value


def accuracy_of(predicted: ArrayLike, expected: ArrayLike) -> Figure:
    """The share of equal labels in percent."""
    return mean(np.asarray(predicted) == np.asarray(expected))


def label_figures(predicted: ArrayLike, expected: ArrayLike) -> dict[str, Figure]:
    """Accuracy, F1 and Matthews correlation of labels ``[units]`` in percent, as in ``metrics``.

    Sums over rows are of hits, expected and predicted labels, by label.
    """
    p, e = np.asarray(predicted, np.int64), np.asarray(expected, np.int64)
    labels = np.arange(max(2, int(max(p.max(), e.max())) + 1))
    of_predicted, of_expected = p[:, None] == labels, e[:, None] == labels
    sums = np.concatenate([of_predicted & of_expected, of_expected, of_predicted], 1)

    def f1(sums: Floats) -> Floats:
        hits, expected, predicted = np.split(sums, 3, axis=1)
        scores = np.nan_to_num(_divided(2 * hits, expected + predicted))
        return np.asarray(scores[:, 1] if len(labels) == 2 else scores.mean(1))

    def matthews(sums: Floats) -> Floats:
        hits, expected, predicted = np.split(sums, 3, axis=1)
        total = expected.sum(1)
        spread = (total**2 - (predicted**2).sum(1)) * (total**2 - (expected**2).sum(1))
        both = hits.sum(1) * total - (predicted * expected).sum(1)
        return np.nan_to_num(_divided(both, np.sqrt(spread)))

    return {"accuracy": accuracy_of(p, e), "f1": of_sums(sums, f1), "matthews": of_sums(sums, matthews)}


def pearson_of(first: ArrayLike, second: ArrayLike) -> Figure:
    """The linear correlation of pairs in percent; NaN where one side is constant."""
    x, y = _standard(first), _standard(second)
    moments = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1)

    def correlation(sums: Floats) -> Floats:
        _, x, y, xx, yy, xy = (sums / sums[:, :1]).T
        spread = np.maximum(xx - x * x, 0.0) * np.maximum(yy - y * y, 0.0)
        return np.clip(_divided(xy - x * y, np.sqrt(spread)), -1.0, 1.0)

    return of_sums(moments, correlation)


def spearman_of(first: ArrayLike, second: ArrayLike) -> Figure:
    """The linear correlation of the ranks in percent, ranked anew in each resample; NaN where one side is constant."""
    sides = [np.unique(np.asarray(side, np.float64), return_inverse=True) for side in (first, second)]

    def ranks(counts: Floats, values: Floats, inverse: NDArray[np.intp]) -> Floats:
        """Those of the units, ``[resamples, units]``, around zero; ties share their mean rank."""
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(len(values)))
        ties = np.add.reduceat(counts[:, order], starts, axis=1)
        middle = ties.cumsum(1) - (ties - 1) / 2
        return np.asarray((middle - (counts.sum(1, keepdims=True) + 1) / 2)[:, inverse])

    def figure(counts: Floats) -> Floats:
        x, y = (ranks(counts, values, inverse) for values, inverse in sides)
        spread = (counts * x * x).sum(1) * (counts * y * y).sum(1)
        return 100 * np.clip(_divided((counts * x * y).sum(1), np.sqrt(spread)), -1.0, 1.0)

    return figure


def point(figure: Figure, units: int) -> float:
    """The figure itself: each unit counts once."""
    return float(figure(np.ones((1, units)))[0])


def _standard(values: ArrayLike) -> Floats:
    """Around zero with a variance of one, so that sums of squares lose no digits."""
    v = np.asarray(values, np.float64)
    spread = v.std()
    return np.asarray((v - v.mean()) / (spread if spread > 0 else 1.0))


def _divided(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan), where=b > 0))
