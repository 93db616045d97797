"""Gradients of fake quantization, and an autograd function: :func:`~bitlower.ir.quantization.numerics.fake` with them.

With ``q = clamp(round(x/s) + z, quant_min, quant_max)`` and ``x̂ = s·(q − z)``:

- ``∂x̂/∂x`` is 1 inside the range and 0 outside (straight-through estimator);
- ``∂x̂/∂s`` is ``round(x/s) − x/s = (x̂ − x)/s`` inside and ``q − z = x̂/s`` outside (Esser et al. 2020, LSQ, eq. 3);
- ``∂x̂/∂z`` is 0 inside and ``−s`` outside (Bondarenko et al. 2021, §5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.granularity import block

aten = torch.ops.aten


@dataclass(frozen=True)
class Clipping:
    """Which values count as outside, and what passes through them.

    Args:
        quant_min: the smallest code.
        quant_max: the largest code.
        after_rounding: a value is inside if its rounded code is (Bondarenko et al.); else if ``x/s + z`` lies strictly
            between the codes at the ends (LSQ; QuantGPT, eq. 7).
        passes: the gradient of ``x`` is 1 outside as well.
        outside_only: what is inside does not count for ``∂x̂/∂s`` (PACT, Choi et al. 2018).
    """

    quant_min: int
    quant_max: int
    after_rounding: bool = False
    passes: bool = False
    outside_only: bool = False

    def ends(self, scale: torch.Tensor, zero_point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The values between which ``x`` is inside, in the shape of ``scale``."""
        margin = 0.5 if self.after_rounding else 0.0
        return (
            (self.quant_min - margin - zero_point) * scale,
            (self.quant_max + margin - zero_point) * scale,
        )


def fake_quantize_gradients(
    gradient: torch.Tensor,
    x: torch.Tensor,
    rounded: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    clipping: Clipping,
    needed: Sequence[bool] = (True, True, True),
    *,
    traceable: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of ``x``, ``scale`` and ``zero_point``; None where ``needed`` is false.

    Args:
        gradient: of ``rounded``.
        x: what was rounded.
        rounded: what :func:`~bitlower.ir.quantization.numerics.fake` gave, in the shape of ``x``.
        scale: in the shape of a stored scale (:class:`~bitlower.ir.quantization.granularity.Granularity`).
        zero_point: whole numbers, in the shape of ``scale``.
        clipping: the range of codes and the rule at its ends.
        needed: of ``x``, ``scale`` and ``zero_point``.
        traceable: read no value into Python, at the price of two more passes over the tensor.
    """
    (g, v, r), (s, z), inner = _blocked((gradient, x, rounded), (scale, zero_point))
    low, high = clipping.ends(s, z)
    by_range = needed[1] or needed[2]
    if scale.dim() == 0 and not traceable:
        inside = aten.hardtanh_backward(g, v, low.item(), high.item())
    else:
        inside = torch.where((v > low) & (v < high), g, 0.0)
    outside = g - inside if by_range else g
    by_scale = by_zero = None
    if needed[1]:
        by_scale = _dot(outside, r, inner)
        if not clipping.outside_only:
            by_scale = by_scale + _dot(inside, r - v, inner)
        by_scale = by_scale.reshape(scale.shape) / scale
    if needed[2]:
        by_zero = -scale * _sum(outside, inner).reshape(scale.shape)
    by_x = (gradient if clipping.passes else inside.reshape(x.shape)) if needed[0] else None
    return by_x, by_scale, by_zero


def _dot(left: torch.Tensor, right: torch.Tensor, inner: list[int] | None) -> torch.Tensor:
    """The sum of the products over the axes ``inner``; over everything if that is None."""
    if inner is None:
        return torch.dot(left.reshape(-1), right.reshape(-1))
    return _sum(left * right, inner)


def _sum(x: torch.Tensor, inner: list[int] | None) -> torch.Tensor:
    """The sum over the axes ``inner``, which torch would take over all if there are none."""
    return x if inner == [] else x.sum(inner)


def _blocked(
    tensors: Sequence[torch.Tensor], ranges: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int] | None]:
    """``tensors`` cut in blocks of what shares a scale, ``ranges`` laid out to broadcast, and the axes in a block.

    The axes are None where all share one scale, and empty where every element has its own.
    """
    shape = ranges[0].shape
    if not shape:
        return list(tensors), list(ranges), None
    if all(s in (1, n) for s, n in zip(shape, tensors[0].shape, strict=True)):
        inner = [axis for axis, size in enumerate(shape) if size == 1]
        return list(tensors), list(ranges), inner
    spread = [part for size in shape for part in (size, 1)]
    cut = [block(tensor, shape) for tensor in tensors]
    return [tensor for tensor, _ in cut], [part.reshape(spread) for part in ranges], cut[0][1]


class _Round(torch.autograd.Function):
    """:func:`~bitlower.ir.quantization.numerics.fake` with the gradients above."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, clipping: Clipping
    ) -> torch.Tensor:
        zero = torch.round(zero_point)
        rounded = numerics.fake(x, scale, zero, clipping.quant_min, clipping.quant_max)
        ctx.clipping = clipping
        ctx.save_for_backward(x, rounded, scale, zero)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rounded, scale, zero = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        return *fake_quantize_gradients(gradients[0], x, rounded, scale, zero, ctx.clipping, needed), None


def round_to_grid(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, clipping: Clipping) -> torch.Tensor:
    """``x`` rounded to its grid, in its dtype, with gradients for all three; zero points are rounded first."""
    result: torch.Tensor = _Round.apply(x, scale, zero_point, clipping)  # type: ignore[no-untyped-call]
    return result
