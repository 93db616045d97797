"""The low-bit operators of a Program, as torch custom ops with gradients and shape functions.

``scale`` and ``zero_point`` are float32 tensors laid out as :class:`~bitlower.ir.quantization.granularity.Granularity`
says. A quantizer that is placed and has no range yet is not *calibrated*, which its last argument says, and lets
values through unchanged, whatever its scale is.
"""

from __future__ import annotations

from typing import Any

import torch

from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.by_rows import by_rows
from bitlower.ir.quantization.granularity import Granularity
from bitlower.ir.quantization.grid import Grid, ScaleConvention
from bitlower.ir.quantization.rounding import Clipping, fake_quantize_gradients

DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "uint16": torch.uint16}


@torch.library.custom_op("bitlower::fake_quantize", mutates_args=())
def _fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    calibrated: bool = True,
) -> torch.Tensor:
    if not calibrated:
        return x.clone()
    return by_rows(
        x, scale, torch.round(zero_point), lambda v, s, z: numerics.fake(v, s, z, quant_min, quant_max), x.dtype
    )


@_fake_quantize.register_fake
def _(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    calibrated: bool = True,
) -> torch.Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.calibrated = inputs
    ctx.save_for_backward(x, output, scale, torch.round(zero_point))


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients as in :mod:`~bitlower.ir.quantization.rounding`, clipping seen after rounding; uncalibrated: as is."""
    if not ctx.calibrated:
        return gradient, *(None,) * 5
    x, rounded, scale, zero = ctx.saved_tensors
    clipping = Clipping(ctx.quant_min, ctx.quant_max, after_rounding=True)
    by = fake_quantize_gradients(gradient, x, rounded, scale, zero, clipping, ctx.needs_input_grad[:3], traceable=True)
    return *by, None, None, None


_fake_quantize.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("bitlower::quantize", mutates_args=())
def _quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int, dtype: str
) -> torch.Tensor:
    def rounded(v: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return numerics.codes(v, s, z, quant_min, quant_max).to(DTYPES[dtype])

    return by_rows(x, scale, zero_point, rounded, DTYPES[dtype])


@_quantize.register_fake
def _(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int, dtype: str
) -> torch.Tensor:
    return torch.empty_like(x, dtype=DTYPES[dtype])


@torch.library.custom_op("bitlower::dequantize", mutates_args=())
def _dequantize(code: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return by_rows(code, scale, zero_point, numerics.values, torch.float32)


@_dequantize.register_fake
def _(code: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(code, dtype=torch.float32)


def _save_codes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dequantize_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """∂x̂/∂s = q − z and ∂x̂/∂z = −s; codes are integers and have none."""
    code, scale, zero = ctx.saved_tensors
    centred = numerics.blockwise(code.float(), scale, zero, lambda q, s, z: q - z)
    by_scale = numerics.sum_like_scale(gradient * centred, scale)
    return None, by_scale, -scale * numerics.sum_like_scale(gradient, scale)


_dequantize.register_autograd(_dequantize_gradients, setup_context=_save_codes)


@torch.library.custom_op("bitlower::choose_qparams", mutates_args=())
def _choose_qparams(
    x: torch.Tensor, bits: int, signed: bool, symmetric: bool, restricted: bool, convention: str
) -> tuple[torch.Tensor, torch.Tensor]:
    grid = Grid(bits, signed, symmetric, restricted, ScaleConvention(convention))
    return grid.qparams(*Granularity.per_token().range_of(x))


@_choose_qparams.register_fake
def _(
    x: torch.Tensor, bits: int, signed: bool, symmetric: bool, restricted: bool, convention: str
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:-1], 1)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


def _no_gradients(ctx: Any, *gradients: torch.Tensor) -> tuple[None, ...]:
    """Scales that are computed from the values count as constants in the backward pass."""
    return (None,) * 6


_choose_qparams.register_autograd(_no_gradients)


fake_quantize = torch.ops.bitlower.fake_quantize.default
quantize = torch.ops.bitlower.quantize.default
dequantize = torch.ops.bitlower.dequantize.default
choose_qparams = torch.ops.bitlower.choose_qparams.default
