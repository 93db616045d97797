"""What ``analyze-embeddings`` leaves: plain data, the table that people read, and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bitlower.passes._machinery.report import Report, Table

BINS = 40
"""Of the histogram of cosines, from −1 to 1."""
_WIDTH, _HEIGHT, _MARGIN = 640, 280, 40
"""Of the picture, in its units."""


@dataclass(frozen=True)
class Similarity:
    """Cosines between all pairs of token embeddings: their mean, and the share of pairs in each of ``BINS`` bins."""

    mean: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class ModuleRange:
    """How a weight is clipped.

    Args:
        tensor: its name.
        role: its role.
        bits: of its codes.
        scales: that it has.
        covered: α / max|w|, the share of the largest weight that the range reaches to, the mean over scales; with
            zero points the share of the distance from the smallest weight to the largest.
        kurtosis: of its values, 3 for a Gaussian.
    """

    tensor: str
    role: str
    bits: int
    scales: int
    covered: float
    kurtosis: float


@dataclass(frozen=True)
class EmbeddingReport(Report):
    """How alike token embeddings are, and how differently weights are clipped.

    Args:
        embeddings: the table.
        tokens: that were compared.
        in_float: their cosines before rounding.
        rounded: the same after; None if the table has no quantizer.
        modules: the weights with quantizers, in graph order.
    """

    embeddings: str
    tokens: int
    in_float: Similarity
    rounded: Similarity | None
    modules: tuple[ModuleRange, ...]

    def table(self) -> Table:
        """One row a weight."""
        return ("weight", "role", "bits", "scales", "α / max|w|", "kurtosis"), [
            (m.tensor, m.role, str(m.bits), str(m.scales), f"{m.covered:.3f}", f"{m.kurtosis:.2f}")
            for m in self.modules
        ]

    def summary(self) -> str:
        """How alike embeddings are."""
        rounded = f", {self.rounded.mean:.3f} rounded" if self.rounded else "; the table has no quantizer"
        return f"the {self.tokens} most frequent tokens have a mean cosine of {self.in_float.mean:.3f}{rounded}"

    def details(self) -> Iterable[str]:
        """Where weights are clipped."""
        if covered := sorted(m.covered for m in self.modules if math.isfinite(m.covered)):
            low, middle, high = covered[0], covered[len(covered) // 2], covered[-1]
            yield f"weights are clipped at {low:.2f} to {high:.2f} of their largest value, median {middle:.2f}"

    def svg(self) -> str:
        """To the left the histogram of cosines, to the right the clipping of each weight, in graph order."""
        half = _WIDTH / 2
        curves = [("steelblue", "float", self.in_float), ("firebrick", "rounded", self.rounded)]
        shown = [(color, name, similarity) for color, name, similarity in curves if similarity is not None]
        top = max((max(similarity.shares) for _, _, similarity in shown), default=0.0) or 1.0
        body = [*_axes(0, "cosine", "−1", "1", f"{top:.0%} of pairs"), *_axes(half, "weight", "", "", "α / max|w|")]
        for line, (color, name, similarity) in enumerate(shown):
            steps = [(i / BINS + 0.5 / BINS, share / top) for i, share in enumerate(similarity.shares)]
            points = " ".join("{:.1f},{:.1f}".format(*_place(0, *step)) for step in steps)
            body.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
            body.append(_text(half - 12, 16 + 16 * line, f"{name}: mean {similarity.mean:.3f}", color))
        covered = [m.covered for m in self.modules if math.isfinite(m.covered)]
        highest = max([1.0, *covered])
        body.append(_text(half + _MARGIN - 4, _place(half, 0, 1)[1], f"{highest:.2g}"))
        for index, value in enumerate(covered):
            x, y = _place(half, (index + 0.5) / len(covered), value / highest)
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="steelblue"/>')
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
            'font-family="sans-serif" font-size="12">\n' + "\n".join(body) + "\n</svg>\n"
        )


def _place(left: float, across: float, up: float) -> tuple[float, float]:
    """Where a point of a panel that begins at ``left`` lies; both coordinates from 0 to 1."""
    return (
        left + _MARGIN + across * (_WIDTH / 2 - 1.5 * _MARGIN),
        _HEIGHT - _MARGIN - up * (_HEIGHT - 2 * _MARGIN),
    )


def _axes(left: float, across: str, first: str, last: str, up: str) -> list[str]:
    (x, bottom), (end, top) = _place(left, 0, 0), _place(left, 1, 1)
    return [
        f'<path d="M{x:.1f} {top:.1f} V{bottom:.1f} H{end:.1f}" fill="none" stroke="black"/>',
        _text((x + end) / 2, bottom + 28, across, anchor="middle"),
        _text(x, bottom + 14, first, anchor="middle"),
        _text(end, bottom + 14, last, anchor="middle"),
        _text(left + 4, 16, up, anchor="start"),
    ]


def _text(x: float, y: float, text: str, color: str = "black", anchor: str = "end") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{text}</text>'
