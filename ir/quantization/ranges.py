"""Range estimators: from observed values to the range a grid should cover (Bondarenko et al. §2; algorithms of PTQ).

Every search includes the exact minimum and maximum among its candidates, so that it is never worse than min–max by its
own measure. All work on many scales at once: values are held as ``[scales, elements]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.grid import Grid

GRID_STEPS = 100
"""Ranges that the search over a grid tries: shares of the widest, one per cent apart."""
GOLDEN_STEPS = 14
"""Each takes 0.618 of the interval: 14 leave a thousandth of it."""
_GOLDEN = (5**0.5 - 1) / 2
"""The golden section: one of two points serves the next step again."""
_SMALLEST = 0.01
"""The share of the min–max range that the search goes down to."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From the low and high ends, ``[scales]`` each, to the loss, ``[scales]``."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins between ``low`` and ``high``, a row for each scale.

    ``low`` and ``high`` have the shape ``[scales]``; ``counts`` is float64 ``[scales, bins]``.
    """

    low: torch.Tensor
    high: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(cls, low: torch.Tensor, high: torch.Tensor, bins: int) -> Histogram:
        """No values yet; they must all lie between ``low`` and ``high``."""
        return cls(low, high, torch.zeros(low.numel(), bins, dtype=torch.float64))

    def add(
        self,
        rows: torch.Tensor,
        *,
        zeros: int = 0,
        weights: torch.Tensor | None = None,
        owner: torch.Tensor | None = None,
    ) -> Histogram:
        """With the values ``[rows, elements]`` added; ``zeros`` of each row are padding and are not counted.

        ``weights``, of the same shape, say how much each value counts; padding has the weight 0 then, and no ``zeros``.
        ``owner`` is the scale of each row; left out, there is a row for each scale.
        """
        scales, bins = self.counts.shape
        owner = torch.arange(scales) if owner is None else owner
        width = self._width()
        index = ((rows - self.low[owner, None]) / width[owner, None]).clamp_(0, bins - 1).to(torch.int64)
        index += owner[:, None] * bins
        flat = weights.reshape(-1).double() if weights is not None else None
        counts = torch.bincount(index.reshape(-1), flat, scales * bins).reshape(scales, bins).double()
        if zeros:
            home = ((0 - self.low) / width).clamp(0, bins - 1).to(torch.int64)
            counts[torch.arange(scales), home] -= zeros * torch.bincount(owner, minlength=scales)
        return replace(self, counts=self.counts + counts)

    def centres(self) -> torch.Tensor:
        """The middle of each bin, ``[scales, bins]``; the outermost are the exact extremes."""
        bins = self.counts.shape[1]
        middles = self.low[:, None] + (torch.arange(bins) + 0.5) * self._width()[:, None]
        middles[:, 0], middles[:, -1] = self.low, self.high
        return middles

    def percentile(self, percent: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The values below which ``100 − percent`` and ``percent`` of the counts lie."""
        share = self.counts.cumsum(1) / self.counts.sum(1, keepdim=True).clamp(min=1)
        middles = self.centres()
        bins = share.shape[1]
        low = (share <= 1 - percent / 100).sum(1, keepdim=True).clamp(max=bins - 1)
        high = (share < percent / 100).sum(1, keepdim=True).clamp(max=bins - 1)
        return middles.gather(1, low).squeeze(1), middles.gather(1, high).squeeze(1)

    def loss(self, grid: Grid) -> Loss:
        """The squared error that ``grid`` makes on these values, for given ends."""
        middles = self.centres()

        def squared_error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
            scale, zero = grid.qparams(low, high)
            rounded = numerics.fake(middles, scale[:, None], zero[:, None], grid.quant_min, grid.quant_max)
            return ((middles - rounded).double().square() * self.counts).sum(1)

        return squared_error

    def _width(self) -> torch.Tensor:
        span = (self.high - self.low) / self.counts.shape[1]
        return torch.where(span > 0, span, torch.ones_like(span))


def exact_loss(rows: torch.Tensor, grid: Grid) -> Loss:
    """The squared error that ``grid`` makes on the values ``[scales, elements]``, for given ends."""

    def squared_error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, zero = grid.qparams(low, high)
        rounded = numerics.fake(rows, scale[:, None], zero[:, None], grid.quant_min, grid.quant_max)
        return (rows - rounded).square_().sum(1, dtype=torch.float64)

    return squared_error


def cross_entropy_loss(logits: torch.Tensor, grid: Grid) -> Loss:
    """−Σ softmax(x)·log softmax(Q(x)) over rows ``[samples, classes]``, for one scale (Bondarenko et al., code)."""
    target = torch.softmax(logits.double(), -1)

    def cross_entropy(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, zero = grid.qparams(low.reshape(()), high.reshape(()))
        rounded = numerics.fake(logits, scale, zero, grid.quant_min, grid.quant_max)
        return -(target * torch.log_softmax(rounded.double(), -1)).sum().reshape(1)

    return cross_entropy


def search_grid(loss: Loss, low: torch.Tensor, high: torch.Tensor, *, two_sided: bool) -> tuple[torch.Tensor, ...]:
    """The best of ``GRID_STEPS`` shrunken ranges, min–max among them; then each end by itself if ``two_sided``."""

    def sweep(ends: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        best = torch.ones_like(low)
        best_loss = loss(*ends(best))
        for step in range(GRID_STEPS - 1, 0, -1):
            factor = torch.full_like(low, step / GRID_STEPS)
            best, best_loss = _keep_better(best, best_loss, factor, loss(*ends(factor)))
        return ends(best)

    return _sweep_ends(sweep, low, high, two_sided)


def search_golden(loss: Loss, low: torch.Tensor, high: torch.Tensor, *, two_sided: bool) -> tuple[torch.Tensor, ...]:
    """Golden-section search for the shrink factor in [0.01, 1]; min–max is kept where it is better."""

    def sweep(ends: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        best = torch.ones_like(low)
        best_loss = loss(*ends(best))
        left, right = torch.full_like(low, _SMALLEST), torch.ones_like(low)
        a, b = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
        loss_a, loss_b = loss(*ends(a)), loss(*ends(b))
        for factor, value in ((a, loss_a), (b, loss_b)):
            best, best_loss = _keep_better(best, best_loss, factor, value)
        for _ in range(GOLDEN_STEPS):
            lower = loss_a < loss_b
            left, right = torch.where(lower, left, a), torch.where(lower, b, right)
            step = _GOLDEN * (right - left)
            factor = torch.where(lower, right - step, left + step)
            value = loss(*ends(factor))
            best, best_loss = _keep_better(best, best_loss, factor, value)
            a, b = torch.where(lower, factor, b), torch.where(lower, a, factor)
            loss_a, loss_b = torch.where(lower, value, loss_b), torch.where(lower, loss_a, value)
        return ends(best)

    return _sweep_ends(sweep, low, high, two_sided)


def _sweep_ends(
    sweep: Callable[..., tuple[torch.Tensor, ...]], low: torch.Tensor, high: torch.Tensor, two_sided: bool
) -> tuple[torch.Tensor, ...]:
    low, high = sweep(lambda c: (low * c, high * c))
    if two_sided:
        fixed_low, fixed_high = low, high
        _, high = sweep(lambda c: (fixed_low, fixed_high * c))
        chosen = high
        low, _ = sweep(lambda c: (fixed_low * c, chosen))
    return low, high


def _keep_better(
    best: torch.Tensor, best_loss: torch.Tensor, factor: torch.Tensor, loss: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    better = loss < best_loss
    return torch.where(better, factor, best), torch.where(better, loss, best_loss)
