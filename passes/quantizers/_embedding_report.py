"""What ``analyze-embeddings`` leaves: plain data, the table that people read, and charts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bitlower.ir.charts import BarChart, Chart, LineChart
from bitlower.passes._machinery.report import Report, Table

BINS = 40
"""Of the histogram of cosines, from −1 to 1."""


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

    def charts(self) -> Iterable[Chart]:
        """The histogram of cosines, and the clipping of each weight, in graph order."""
        curves = {"float": self.in_float, "rounded": self.rounded}
        lines = {
            name: tuple(((2 * i + 1) / BINS - 1, share) for i, share in enumerate(similarity.shares))
            for name, similarity in curves.items()
            if similarity is not None
        }
        yield LineChart("Cosines between embeddings", "cosine", "share of the pairs", lines)
        if clipped := [module for module in self.modules if math.isfinite(module.covered)]:
            names, covered = (tuple(getattr(module, key) for module in clipped) for key in ("tensor", "covered"))
            yield BarChart("Clipping of weights", "α / max|w|", names, {"α / max|w|": covered})
