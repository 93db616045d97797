"""What ``analyze-outliers`` leaves: plain data, and the tables that people read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitlower.ir.charts import BarChart, Chart
from bitlower.passes._machinery.report import Report, Table, counted

NO_OP_SHARE = 0.9
"""A head that puts more than this on the separator does nothing (Bondarenko et al. §3)."""


"""Headers and rows."""


@dataclass(frozen=True)
class DimensionCount:
    """Outliers at one index of the last axis; ``share`` is that of the sequences which have one there."""

    index: int
    outliers: int
    share: float


@dataclass(frozen=True)
class PositionCount:
    """Outliers at one position of the sequence, padding not counted."""

    position: int
    outliers: int


@dataclass(frozen=True)
class TokenCount:
    """Outliers at one token; ``text`` is empty where the program has no tokenizer."""

    token: int
    text: str
    special: bool
    outliers: int


@dataclass(frozen=True)
class TensorRange:
    """The values of one tensor over the calibration data, padding left out.

    Args:
        node: the node that computes it.
        path: the module path.
        roles: ``linear-input``, ``linear-output``, ``norm``, ``residual``.
        count: how many values.
        minimum: the smallest.
        maximum: the largest.
        mean: of all.
        std: around the mean, divided by ``count``.
        kurtosis: the fourth central moment over the squared variance; 3 for a Gaussian.
        outliers: values further than sigma standard deviations from the mean.
        outlier_dimensions: how many indices of the last axis have one.
        dimensions: those with most outliers, most first.
        positions: those with most outliers, most first; empty for values that belong to no token.
        tokens: those with most outliers, most first.
    """

    node: str
    path: str
    roles: tuple[str, ...]
    count: int
    minimum: float
    maximum: float
    mean: float
    std: float
    kurtosis: float
    outliers: int
    outlier_dimensions: int
    dimensions: tuple[DimensionCount, ...]
    positions: tuple[PositionCount, ...]
    tokens: tuple[TokenCount, ...]

    @property
    def absmax(self) -> float:
        """The largest absolute value."""
        return max(-self.minimum, self.maximum)

    @property
    def max_over_std(self) -> float:
        """The largest absolute value in standard deviations; what a per-tensor grid of few steps suffers from."""
        return self.absmax / self.std if self.std else 0.0

    @property
    def width(self) -> float:
        """Maximum less minimum."""
        return self.maximum - self.minimum


@dataclass(frozen=True)
class FeedForwardOutliers:
    """The tensors around one feed-forward network, by node: input x, output h, residual sum y (Bondarenko et al. §3).

    ``output_ratio`` and ``sum_ratio`` are their widths over that of the input.
    """

    path: str
    input: str
    output: str
    sum: str
    output_ratio: float
    sum_ratio: float


@dataclass(frozen=True)
class HeadAttention:
    """One attention head and the separator token.

    Args:
        node: the attention, or its softmax.
        path: the module path.
        head: its index.
        separator_share: the attention mass on separators, mean over all queries that are no padding.
        value_ratio: the mean norm of the separators' value vectors over the median norm of all tokens'.
    """

    node: str
    path: str
    head: int
    separator_share: float
    value_ratio: float

    @property
    def no_op(self) -> bool:
        """Whether the head looks at separators and little else."""
        return self.separator_share > NO_OP_SHARE


@dataclass(frozen=True)
class ClampRate:
    """The share of values that one calibrated static quantizer clamps to the ends of its grid."""

    node: str
    path: str
    role: str
    tensor: str
    rate: float


@dataclass(frozen=True)
class OutlierReport(Report):
    """Ranges, outliers, attention and clamping of a Program on its calibration data.

    Args:
        sigma: from how many standard deviations on a value is an outlier.
        sequences: how many were looked at.
        tokens: how many were looked at, padding left out; 0 for models without tokens.
        tensors: in execution order.
        feed_forwards: in execution order.
        heads: in execution order; empty without a separator token.
        clamps: in execution order; empty at level float.
    """

    sigma: float
    sequences: int
    tokens: int
    tensors: tuple[TensorRange, ...]
    feed_forwards: tuple[FeedForwardOutliers, ...]
    heads: tuple[HeadAttention, ...]
    clamps: tuple[ClampRate, ...]

    def summary(self) -> str:
        """The widest range."""
        text = f"{counted(len(self.tensors), 'tensor')} on {counted(self.tokens, 'token')}"
        if not self.tensors:
            return text
        widest = max(self.tensors, key=lambda tensor: tensor.max_over_std)
        place = widest.path or widest.node
        return f"{text}; widest: {place} ({', '.join(widest.roles)}), {widest.max_over_std:.3g} standard deviations"

    def details(self) -> Iterable[str]:
        """The feed-forward network and the heads that make outliers, and the quantizer that clamps most."""
        if self.feed_forwards:
            worst = max(self.feed_forwards, key=lambda part: part.sum_ratio)
            yield f"residual sum of {worst.path}: {worst.sum_ratio:.3g} times as wide as the network's input"
        if silent := sum(head.no_op for head in self.heads):
            yield f"{silent:,} of {counted(len(self.heads), 'head')} look at separators and little else"
        if self.clamps:
            most = max(self.clamps, key=lambda clamp: clamp.rate)
            yield f"{most.tensor} is clamped most: {most.rate:.3%} of its values"

    def charts(self) -> Iterable[Chart]:
        """How far the largest value of residual sums and of networks' outputs lies from the others."""
        shown = [tensor for tensor in self.tensors if {"residual", "linear-output"} & {*tensor.roles}]
        if shown:
            names = tuple(tensor.path for tensor in shown)
            bars = {"largest value": tuple(tensor.max_over_std for tensor in shown)}
            yield BarChart("Largest values, before any quantizer", "standard deviations", names, bars, "outliers")

    def __getitem__(self, node: str) -> TensorRange:
        """The tensor that the node called ``node`` computes; KeyError if it was not looked at."""
        for tensor in self.tensors:
            if tensor.node == node:
                return tensor
        raise KeyError(node)

    def table(self) -> Table:
        """One row a tensor, the one with the widest range in standard deviations first."""
        headers = ("module", "tensor", "role", "min", "max", "std", "max/std", "kurtosis", f">{self.sigma:g}σ",
                   "dimensions", "tokens")  # fmt: skip
        ordered = sorted(self.tensors, key=lambda t: -t.max_over_std)
        return headers, [_tensor_row(tensor) for tensor in ordered]

    def feed_forward_table(self) -> Table:
        """One row a feed-forward network: ranges of input, output and sum."""
        rows: list[tuple[str, ...]] = []
        for part in sorted(self.feed_forwards, key=lambda f: -max(f.output_ratio, f.sum_ratio)):
            ranges = [f"[{self[n].minimum:.4g}, {self[n].maximum:.4g}]" for n in (part.input, part.output, part.sum)]
            rows.append((part.path, *ranges, f"{part.output_ratio:.3g}", f"{part.sum_ratio:.3g}"))
        return ("module", "input x", "output h", "sum y", "h/x", "y/x"), rows

    def head_table(self) -> Table:
        """One row a head, the largest share on separators first."""
        ordered = sorted(self.heads, key=lambda h: -h.separator_share)
        rows: list[tuple[str, ...]] = [
            (h.path, str(h.head), f"{h.separator_share:.3f}", f"{h.value_ratio:.3g}", "no-op" if h.no_op else "")
            for h in ordered
        ]
        return ("module", "head", "on separator", "|v| ratio", ""), rows

    def clamp_table(self) -> Table:
        """One row a quantizer, the one that clamps most first."""
        ordered = sorted(self.clamps, key=lambda c: -c.rate)
        return ("module", "tensor", "role", "clamped"), [(c.path, c.tensor, c.role, f"{c.rate:.3%}") for c in ordered]


def _tensor_row(tensor: TensorRange) -> tuple[str, ...]:
    numbers = (tensor.minimum, tensor.maximum, tensor.std, tensor.max_over_std, tensor.kurtosis)
    dimensions = ", ".join(f"{d.index} ({d.share:.0%})" for d in tensor.dimensions[:3])
    more = tensor.outlier_dimensions - min(3, len(tensor.dimensions))
    tokens = ", ".join(f"{t.text or t.token} ×{t.outliers}" for t in tensor.tokens[:3])
    return (
        tensor.path,
        tensor.node,
        ", ".join(tensor.roles),
        *(f"{number:.4g}" for number in numbers),
        str(tensor.outliers),
        f"{dimensions}, {more} more" if more > 0 else dimensions,
        tokens,
    )
