"""The one implementation of quantize and dequantize.

``q = clamp(round_half_even(x / scale) + zero_point, quant_min, quant_max)`` and ``x̂ = scale · (q − zero_point)``, in
float32, with a true division: multiplying by ``1 / scale`` gives other codes at ties, and onnxruntime divides.
Scales of any :class:`~bitlower.ir.quantization.granularity.Granularity` are broadcast over blocks of consecutive
elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bitlower.ir.quantization.granularity import block


def codes(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    """The codes of ``x`` as whole numbers, float32 (float64 for a float64 ``x``)."""
    return blockwise(_wide(x), scale, zero_point, lambda v, s, z: (v / s).round_().add_(z).clamp_(quant_min, quant_max))


def values(code: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The real values of codes (any integer or float dtype), float32."""
    fresh = code.clone() if code.dtype == torch.float32 else code.float()
    return blockwise(fresh, scale, zero_point, lambda q, s, z: q.sub_(z).mul_(s))


def fake(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    """``values(codes(x))`` in one go: ``x`` rounded to its grid, in the dtype of ``x``."""

    def round_trip(v: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (v / s).round_().add_(z).clamp_(quant_min, quant_max).sub_(z).mul_(s)

    return blockwise(_wide(x), scale, zero_point, round_trip).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float32 at least: the codes of more than 8 bits are not exact in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def blockwise(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``function(x, scale, zero_point)``, elementwise, with scales and zero points spread over their blocks.

    Raises:
        BitlowerError: the scale does not fit the shape of ``x``.
    """
    if scale.dim() == 0:
        return function(x, scale, zero_point)
    if all(s in (1, n) for s, n in zip(scale.shape, x.shape, strict=False)) and scale.dim() == x.dim():
        return function(x, scale, zero_point)
    blocked, _ = block(x, scale.shape)
    spread = [part for s in scale.shape for part in (s, 1)]
    return function(blocked, scale.reshape(spread), zero_point.reshape(spread)).reshape(x.shape)


def sum_like_scale(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``gradient`` summed over the elements that share each entry of ``scale``."""
    if scale.dim() == 0:
        return gradient.sum()
    blocked, inner = block(gradient, scale.shape)
    return blocked.sum(inner).reshape(scale.shape)


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Let products of float32 matrices be those of their values in bfloat16, summed in float32, where the CPU can."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.matmul.fp32_precision
    mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        mkldnn.matmul.fp32_precision = before
