"""Statistics that stream over batches: moments, outlier counts, attention on separators, clamp counts.

All sums are float64 and depend on the batches and their order alone.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from bitlower.ir import Batch, Grid
from bitlower.ir.quantization import numerics
from bitlower.ir.tokens import SEQUENCE, token_ids, token_mask

_BLOCK = 2**14
"""Values at a time: 128 KB in float64, which stay in the second-level cache over the four moments."""


@dataclass
class Tokens:
    """The tokens of one batch, padding left out, one entry each in the order of the rows.

    Args:
        mask: which tokens are no padding, ``[batch, sequence]``.
        sequence: the number of the sequence, counted over all batches.
        position: in the sequence, padding on the left not counted.
        ids: the token; empty where the batch has no ``input_ids``.
    """

    mask: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    ids: torch.Tensor

    def select(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of ``rows``, one for each token of the batch, that are no padding."""
        return rows if len(self.sequence) == len(rows) else rows[self.mask.reshape(-1)]

    @classmethod
    def of(cls, batch: Batch, first_sequence: int, dim: str = SEQUENCE) -> Tokens | None:
        """From the mask and the token ids along ``dim``; None where a batch has neither."""
        ids, mask = token_ids(batch, dim), token_mask(batch, dim)
        shape = mask if mask is not None else ids
        if shape is None or shape.dim() != 2:
            return None
        keep = mask if mask is not None else torch.ones_like(shape, dtype=torch.bool)
        sequence = torch.arange(keep.shape[0])[:, None].expand_as(keep) + first_sequence
        position = keep.long().cumsum(1) - 1
        chosen = ids[keep] if ids is not None else torch.empty(0, dtype=torch.int64)
        return cls(keep, sequence[keep], position[keep], chosen)


@dataclass
class Moments:
    """Count, extremes and the first four central moments, merged batch by batch (Pébay 2008, eqs. 2.1 and 3.1)."""

    count: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0

    def update(self, values: torch.Tensor) -> None:
        """Add all of ``values``; read in blocks that fit into the processor's cache."""
        if not values.numel():
            return
        for block in torch.split(values.reshape(-1), _BLOCK):
            low, high = torch.aminmax(block)
            x = block.double()
            mean = float(x.mean())
            square = x.sub_(mean).square()
            m2, m3, m4 = float(square.sum()), float(torch.dot(square, x)), float(torch.dot(square, square))
            self._merge(Moments(x.numel(), float(low), float(high), mean, m2, m3, m4))

    def _merge(self, other: Moments) -> None:
        a, b = self.count, other.count
        n, delta = a + b, other.mean - self.mean
        m4 = self.m4 + other.m4 + delta**4 * a * b * (a * a - a * b + b * b) / n**3
        m4 += 6 * delta**2 * (a * a * other.m2 + b * b * self.m2) / n**2 + 4 * delta * (a * other.m3 - b * self.m3) / n
        m3 = self.m3 + other.m3 + delta**3 * a * b * (a - b) / n**2 + 3 * delta * (a * other.m2 - b * self.m2) / n
        self.m2, self.m3, self.m4 = self.m2 + other.m2 + delta**2 * a * b / n, m3, m4
        self.mean += delta * b / n
        self.count = n
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)

    @property
    def std(self) -> float:
        """The standard deviation, divided by the count."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    @property
    def kurtosis(self) -> float:
        """The fourth moment over the squared variance; 0 for a constant."""
        return self.count * self.m4 / self.m2**2 if self.m2 > 0 else 0.0


@dataclass
class OutlierCounts:
    """Values further than ``distance`` from ``mean``: how many, and where."""

    mean: float
    distance: float
    total: int = 0
    dimensions: Counter[int] = field(default_factory=Counter)
    sequences: Counter[int] = field(default_factory=Counter)
    positions: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)

    def update(self, rows: torch.Tensor, sequence: torch.Tensor, tokens: Tokens | None) -> None:
        """Add ``rows`` of shape ``[n, d]``; ``sequence`` numbers the sequence of each row, ``tokens`` are the rows'."""
        low, high = torch.aminmax(rows, dim=1)
        near = self._beyond(torch.maximum(high.double() - self.mean, self.mean - low.double())).nonzero().reshape(-1)
        row, dimension = self._beyond((rows[near].double() - self.mean).abs()).nonzero(as_tuple=True)
        row = near[row]
        self.total += row.numel()
        _count(self.dimensions, dimension)
        width = rows.shape[-1]
        _count(self.sequences, torch.unique(sequence[row] * width + dimension) % width)
        if tokens is not None:
            _count(self.positions, tokens.position[row])
            _count(self.tokens, tokens.ids[row] if tokens.ids.numel() else tokens.ids)

    def _beyond(self, distances: torch.Tensor) -> torch.Tensor:
        return distances > self.distance


def _count(counter: Counter[int], values: torch.Tensor) -> None:
    unique, counts = torch.unique(values, return_counts=True)
    counter.update(dict(zip(unique.tolist(), counts.tolist(), strict=True)))


def most_common(counter: Counter[int], limit: int) -> list[tuple[int, int]]:
    """The ``limit`` largest counts; equal ones in the order of their keys."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:limit]


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, *, causal: bool, scale: float | None
) -> torch.Tensor:
    """``softmax(scale · QKᵀ + mask)`` as ``scaled_dot_product_attention`` has it: ``[batch, heads, queries, keys]``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-2, -1) * scale
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)


@dataclass
class SeparatorAttention:
    """Attention mass on separators and the norms of value vectors, by head; one norm a token and head is kept."""

    mass: torch.Tensor | None = None
    queries: int = 0
    norms: list[torch.Tensor] = field(default_factory=list)
    at_separator: list[torch.Tensor] = field(default_factory=list)

    def update(self, probs: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, separator: torch.Tensor) -> None:
        """Add one batch; ``mask`` and ``separator`` say which tokens count and which are separators."""
        on_separator = torch.where(separator[:, None, None, :], probs, 0.0).sum(-1).transpose(1, 2)[mask]
        mass = on_separator.double().sum(0)
        self.mass = mass if self.mass is None else self.mass + mass
        self.queries += on_separator.shape[0]
        norms = value.norm(dim=-1).transpose(1, 2)[mask]
        self.norms.append(norms.repeat_interleave(probs.shape[1] // norms.shape[1], 1))
        self.at_separator.append(separator[mask])

    def heads(self) -> list[tuple[float, float]]:
        """For each head the mean mass, and the mean norm at separators over the median norm of all tokens."""
        if self.mass is None or not self.queries:
            return []
        norms, separator = torch.cat(self.norms).double().numpy(), torch.cat(self.at_separator).numpy()
        median = np.median(norms, axis=0)
        chosen = norms[separator].mean(axis=0) if separator.any() else np.zeros_like(median)
        ratios = np.divide(chosen, median, out=np.zeros_like(median), where=median > 0)
        return list(zip((self.mass / self.queries).tolist(), ratios.tolist(), strict=True))


@dataclass
class ClampCount:
    """How many values a quantizer clamps."""

    clamped: int = 0
    total: int = 0

    def update(
        self, x: torch.Tensor, keep: torch.Tensor | None, grid: Grid, scale: torch.Tensor, zero_point: torch.Tensor
    ) -> None:
        """Add the values of ``x`` where ``keep``, which broadcasts over it, says so."""
        codes = numerics.codes(x.float(), scale, torch.round(zero_point), -(2**24), 2**24)
        outside = (codes < grid.quant_min) | (codes > grid.quant_max)
        if keep is None:
            self.clamped, self.total = self.clamped + int(outside.sum()), self.total + x.numel()
        else:
            self.clamped += int((outside & keep).sum())
            self.total += int(keep.expand_as(x).sum())

    @property
    def rate(self) -> float:
        """The share that is clamped."""
        return self.clamped / self.total if self.total else 0.0
