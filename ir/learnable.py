"""Fake quantizers whose range can change while a model is trained: what is learned, and how ranges follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.fit import Batch
from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.granularity import Granularity
from bitlower.ir.quantization.rounding import Clipping, round_to_grid
from bitlower.ir.quantization.scheme import QuantSpec
from bitlower.ir.tokens import value_mask

Ranges = Literal["fixed", "learned", "observed"]
Parametrization = Literal["amax", "scale", "log", "gamma", "pact", "laq"]
GradientScale = Literal["lsq", "plain"]
ClippedGradient = Literal["zero", "pass"]
Edge = Literal["before-rounding", "after-rounding"]
FOR_WEIGHTS = ("gamma", "pact", "laq")
"""Parametrizations of weights; activations beside them have ``amax``."""
FLOOR = 1e-3
"""A learned scale never falls below this share of its first value; one that is there is called dead."""
_MOMENTUM = 0.9
"""The weight of the old range where ranges follow the batches (Jacob et al. 2018, §3.1: close to 1)."""
_LAQ_SWEEPS = 10
"""Turns between codes and scale at a step of LAQ; each ends where the one before it left off."""


@dataclass(frozen=True)
class RangeSettings:
    """How the ranges of quantizers behave while a model is trained.

    Args:
        ranges: ``fixed``: as calibrated; ``learned``: by gradient; ``observed``: activations have an exponential
            average of the extremes of batches (0.9 on the old value), weights their extremes at each step.
        parametrization: what is learned: the largest value of the range (``amax``), the ``scale`` itself, or its
            logarithm (``log``). Three are for weights: ``gamma`` is QuantGPT's module-wise dynamic scaling,
            ``scale = γ · mean|w| / quant_max`` (§3.3, eq. 6 and 7); ``pact`` learns the clip value from what is
            clipped alone (Choi et al. 2018); ``laq`` fits the scale to the weights at each step by alternating least
            squares (Hou & Kwok 2018, with equal curvature), and all gradients pass.
        gradient_scale: ``lsq`` multiplies the gradient of a scale by ``1/√(n·quant_max)``, n being the elements that
            share it (Esser et al. 2020, §2.2); ``plain`` leaves it (Bondarenko et al. 2021).
        clipped_gradient: what passes through a clipped value: nothing (``zero``), or all (``pass``).
        edge: whether a value is clipped is seen ``before-rounding`` or ``after-rounding``
            (:class:`~bitlower.ir.quantization.rounding.Clipping`).
    """

    ranges: Ranges = "learned"
    parametrization: Parametrization = "amax"
    gradient_scale: GradientScale = "lsq"
    clipped_gradient: ClippedGradient = "zero"
    edge: Edge = "before-rounding"


class LearnableQuantizer(nn.Module):
    """Rounds its input as a calibrated ``fake_quantize`` node does; scale and zero point can change.

    What is learned is the parameter ``range`` (:class:`RangeSettings` says what that is), float32, one entry for each
    scale, and ``zero`` where the grid has zero points; stored scales of one group of several blocks are one entry.

    Args:
        spec: grid and granularity.
        scale: as calibrated, in the shape that is stored.
        zero_point: the same.
        settings: how the range behaves.
        weight: the parameter that is quantized; None for an activation.
        shape: of an activation, with symbolic dimensions: what :attr:`batch`, the inputs of the model, calls padding
            is then not observed.

    Raises:
        BitlowerError: the quantizer is not calibrated, or ``gamma`` meets a grid with zero points.
    """

    batch: Batch
    frozen: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    first_range: torch.Tensor
    first_mean: torch.Tensor

    def __init__(
        self,
        spec: QuantSpec,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        settings: RangeSettings,
        weight: torch.Tensor | None = None,
        shape: tuple[int | str, ...] = (),
    ) -> None:
        super().__init__()
        grid = spec.grid
        self.spec, self.mode, self.activation_shape = spec, settings.ranges, shape
        self.is_weight, self.batch = weight is not None, {}
        self.kind = "amax" if weight is None and settings.parametrization in FOR_WEIGHTS else settings.parametrization
        if self.kind == "gamma" and not grid.symmetric:
            raise BitlowerError("module-wise scaling needs a symmetric grid", hint="drop `asym`, or use amax")
        self.lsq = settings.gradient_scale == "lsq"
        self.span = grid.quant_max if grid.symmetric else grid.quant_max - grid.quant_min
        self.clipping = Clipping(
            grid.quant_min,
            grid.quant_max,
            after_rounding=settings.edge == "after-rounding",
            passes=settings.clipped_gradient == "pass" or self.kind == "laq",
            outside_only=self.kind == "pact",
        )
        self.groups = Groups.of(spec.granularity, scale, zero_point, weight)
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.detach().clone())
        self.register_buffer("frozen", torch.tensor(settings.ranges == "fixed"))
        if self.learns:
            self._learn(weight)

    def _learn(self, weight: torch.Tensor | None) -> None:
        scale = self.groups.take(self.scale)
        start = scale.log() if self.kind == "log" else scale if self.kind == "scale" else scale * self.span
        if self.kind == "gamma" and weight is not None:
            self.register_buffer("first_mean", self._mean(weight))
            start = start / self.groups.take(self.first_mean)
        self.register_buffer("first_range", start.clone())
        self.range = nn.Parameter(start.clone())
        if not self.spec.grid.symmetric:
            self.zero = nn.Parameter(self.groups.take(self.zero_point).clone())

    @property
    def learns(self) -> bool:
        """Whether gradients change the range."""
        return self.mode == "learned" and self.kind != "laq" and not self.frozen

    def forward(self, x: torch.Tensor, rows: torch.Tensor | None = None, padding: int = -1) -> torch.Tensor:
        """``x`` rounded to its grid.

        Args:
            x: an activation, or the whole weight.
            rows: indices of any shape: only these rows of the weight are taken and rounded, as an embedding does.
            padding: the row that gets no gradient, as in an embedding.
        """
        if self.training and not self.frozen and self.mode == "observed":
            self._observe(x.detach())
        elif self.training and not self.frozen and self.kind == "laq":
            self.scale = self._least_squares(x.detach())
        scale, zero = self._attached(x)
        if rows is not None:
            x, scale, zero = _rows(x, scale, zero, rows, padding)
        return round_to_grid(x, scale, zero, self.clipping)

    def qparams(self, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point as they are now, in the shape that is stored; ``gamma`` needs the current weight."""
        with torch.no_grad():
            scale, zero = self._attached(weight)
            return scale.clone(), zero.round()

    def freeze(self, weight: torch.Tensor | None = None) -> None:
        """Make the range a constant: what it is now."""
        scale, zero = self.qparams(weight)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)
        self.frozen.fill_(True)

    def dead(self) -> int:
        """How many scales lie at the floor."""
        return int((self._ratio() <= FLOOR).sum()) if hasattr(self, "range") else 0

    def _attached(self, weight: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point with their gradients; the zero point is not rounded."""
        if not self.learns:
            return self.scale, self.zero_point
        ratio = self.groups.spread(self._ratio().clamp(min=FLOOR))
        if self.kind == "gamma" and weight is not None:
            ratio = ratio * (self._mean(weight) / self.first_mean)
        scale, zero = self.scale * ratio, self.zero_point
        if hasattr(self, "zero"):
            zero = self.groups.spread(self.zero.clamp(self.clipping.quant_min, self.clipping.quant_max))
        if self.lsq and scale.requires_grad and weight is not None:
            factor = (weight.numel() / scale.numel() * self.clipping.quant_max) ** -0.5
            scale.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
        return scale, zero

    def _ratio(self) -> torch.Tensor:
        """The range in units of its first value: exactly 1 at the start, so that nothing changes before it learns."""
        return (self.range - self.first_range).exp() if self.kind == "log" else self.range / self.first_range

    def _mean(self, weight: torch.Tensor) -> torch.Tensor:
        """``mean|w|`` over what shares a scale, detached, in the shape of the scale."""
        total = numerics.sum_like_scale(weight.detach().abs().float(), self.scale)
        return total * (self.scale.numel() / weight.numel())

    def _observe(self, x: torch.Tensor) -> None:
        keep = None if self.is_weight else value_mask(self.activation_shape, self.batch)
        low, high = self.spec.granularity.range_of(x if keep is None else x.masked_fill(~keep, 0.0))
        if not self.is_weight:
            grid = self.spec.grid
            ends = ((grid.quant_min - self.zero_point) * self.scale, (grid.quant_max - self.zero_point) * self.scale)
            low, high = (_MOMENTUM * old + (1 - _MOMENTUM) * new for old, new in zip(ends, (low, high), strict=True))
        low, high = (self.groups.spread(part) for part in self.groups.join(low, high))
        scale, zero = self.spec.grid.qparams(low, high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)

    def _least_squares(self, weight: torch.Tensor) -> torch.Tensor:
        """The scale that is best for the codes that are best for it, from where it is now."""
        scale, zero = self.scale, torch.zeros_like(self.scale)
        for _ in range(_LAQ_SWEEPS):
            codes = numerics.codes(weight, scale, zero, self.clipping.quant_min, self.clipping.quant_max)
            energy = numerics.sum_like_scale(codes.square(), scale)
            optimum = numerics.sum_like_scale(codes * weight, scale) / energy
            scale = torch.where(energy > 0, optimum, scale)
        return scale


@dataclass(frozen=True)
class Groups:
    """Which stored scales are one group's: those at the same entry of ``owner`` along ``axis``; None: each its own.

    Groups whose size does not divide their axis are stored in blocks, and unequal parts once for each index
    (:class:`~bitlower.ir.quantization.granularity.Granularity`): what is learned must stay equal within them.
    """

    axis: int
    owner: torch.Tensor | None = None

    @classmethod
    def of(
        cls, granularity: Granularity, scale: torch.Tensor, zero_point: torch.Tensor, weight: torch.Tensor | None
    ) -> Groups:
        """The groups of a calibrated quantizer."""
        axis = granularity.axis
        if granularity.chosen:
            pairs = torch.stack([scale, zero_point]).reshape(2, -1)
            change = (pairs[:, 1:] != pairs[:, :-1]).any(0).long()
            return cls(-1, functional.pad(change, (1, 0)).cumsum(0))
        if granularity.kind == "group" and weight is not None:
            extent, blocks = weight.shape[axis], scale.shape[axis]
            owner = torch.arange(blocks) * (extent // blocks) // min(granularity.group_size, extent)
            return cls(axis, owner if int(owner[-1]) + 1 < blocks else None)
        return cls(axis)

    def take(self, stored: torch.Tensor) -> torch.Tensor:
        """One entry for each group, of what is equal within groups."""
        if self.owner is None:
            return stored
        first = torch.searchsorted(self.owner, torch.arange(int(self.owner[-1]) + 1))
        return stored.index_select(self.axis, first.to(stored.device))

    def spread(self, entries: torch.Tensor) -> torch.Tensor:
        """What :meth:`take` gave, as it is stored."""
        return entries if self.owner is None else entries.index_select(self.axis, self.owner.to(entries.device))

    def join(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The extremes of each group, of those of what is stored."""
        if self.owner is None:
            return low, high
        shape = list(low.shape)
        shape[self.axis] = int(self.owner[-1]) + 1
        index = self.owner.view([-1 if i == self.axis % low.dim() else 1 for i in range(low.dim())]).expand_as(low)
        lowest = low.new_zeros(shape).scatter_reduce(self.axis, index, low, "amin", include_self=False)
        return lowest, high.new_zeros(shape).scatter_reduce(self.axis, index, high, "amax", include_self=False)


def _rows(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, rows: torch.Tensor, padding: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some rows of a weight, and their scales and zero points, laid out for the shape of what comes out."""
    values = functional.embedding(rows, weight, padding if padding >= 0 else None)
    if not scale.dim():
        return values, scale, zero
    index = rows // (weight.shape[0] // scale.shape[0])
    return values, _at(scale, index), _at(zero, index)


def _at(ranges: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    shape: Sequence[int] = (*index.shape, *ranges.shape[1:])
    return ranges.index_select(0, index.reshape(-1)).reshape(shape)
