"""The measures that evaluations report, each from its definition; labels are whole numbers from 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from bitlower.ir import CheckError

Floats = NDArray[np.float64]


def pearson(predicted: ArrayLike, expected: ArrayLike) -> float:
    """The linear correlation ``cov(p, e) / (σ_p σ_e)``, from -1 to 1.

    Raises:
        CheckError: fewer than two pairs, unequal lengths, a value that is not finite, or one side is constant.
    """
    p, e = _pairs(predicted, expected)
    if np.ptp(p) == 0.0 or np.ptp(e) == 0.0:
        raise CheckError("a correlation is not defined where all values are equal")
    p, e = _centred(p), _centred(e)
    return float(np.clip(p @ e / np.sqrt((p @ p) * (e @ e)), -1.0, 1.0))


def spearman(predicted: ArrayLike, expected: ArrayLike) -> float:
    """The linear correlation of the ranks (ties share their mean rank), from -1 to 1; raises as :func:`pearson`."""
    p, e = _pairs(predicted, expected)
    return pearson(rankdata(p), rankdata(e))


def accuracy(predicted: ArrayLike, expected: ArrayLike) -> float:
    """The share of equal labels, from 0 to 1.

    Raises:
        CheckError: no labels, or unequal lengths.
    """
    counts = _confusion(predicted, expected)
    return float(np.trace(counts) / counts.sum())


def f1(predicted: ArrayLike, expected: ArrayLike) -> float:
    """``2·tp / (2·tp + fp + fn)``: of label 1 if there are two labels (as GLUE), else the mean over labels (macro).

    A label that neither side has counts 0. Raises as :func:`accuracy`.
    """
    counts = _confusion(predicted, expected)
    hits = np.diag(counts)
    total = counts.sum(0) + counts.sum(1)
    scores = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)
    return float(scores[1] if len(scores) == 2 else scores.mean())


def matthews(predicted: ArrayLike, expected: ArrayLike) -> float:
    """The correlation of labels for any number of them (Gorodkin 2004, R_K), from -1 to 1; 0 if one side is constant.

    Raises as :func:`accuracy`.
    """
    counts = _confusion(predicted, expected)
    total, hits = counts.sum(), np.trace(counts)
    expected_counts, predicted_counts = counts.sum(1), counts.sum(0)
    spread = (total**2 - predicted_counts @ predicted_counts) * (total**2 - expected_counts @ expected_counts)
    return float((hits * total - predicted_counts @ expected_counts) / np.sqrt(spread)) if spread > 0 else 0.0


def _pairs(predicted: ArrayLike, expected: ArrayLike) -> tuple[Floats, Floats]:
    p, e = np.asarray(predicted, np.float64), np.asarray(expected, np.float64)
    if p.shape != e.shape or p.ndim != 1 or p.size < 2:
        raise CheckError(f"a correlation needs two or more pairs, not {p.shape} against {e.shape}")
    if not (np.isfinite(p).all() and np.isfinite(e).all()):
        raise CheckError("a correlation needs finite values; a NaN or Inf was found")
    return p, e


def _centred(x: Floats) -> Floats:
    """Around zero, and scaled so that squares neither overflow nor vanish."""
    centred = x - x.mean()
    return np.asarray(centred / np.abs(centred).max())


def _confusion(predicted: ArrayLike, expected: ArrayLike) -> Floats:
    """Counts by (expected, predicted) label; at least 2 × 2."""
    p, e = np.asarray(predicted, np.int64), np.asarray(expected, np.int64)
    if p.shape != e.shape or p.ndim != 1 or p.size == 0:
        raise CheckError(f"labels do not pair up: {p.shape} against {e.shape}")
    labels = max(2, int(max(p.max(), e.max())) + 1)
    counts = np.zeros((labels, labels), np.float64)
    np.add.at(counts, (e, p), 1.0)
    return counts
