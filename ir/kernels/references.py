"""The kernel operators of a fused Program, as torch custom ops with reference implementations and shape functions.

Each stands for one kernel. It reads values that are float, or codes with a scale and a zero point (``x`` with
``x_scale`` and ``x_zero_point``, both in one shape, as :class:`~bitlower.ir.quantization.granularity.Granularity` lays
it out), and returns a list of tensors, those that ``outputs`` names:

- ``value``: the result, float32;
- ``codes``: the result on the grid ``out_grid``, in that grid's dtype; with ``out_scale`` and ``out_zero_point`` as
  given, or, where they are left out, chosen for each token when the program runs;
- ``scale``, ``zero_point``: what was chosen, float32 ``[…, 1]``;
- ``rounded``: the values of the codes, float32.

The references compute in float32 exactly what the integer Program computes with ``dequantize``, ATen operators and
``quantize``, in the same order. :mod:`bitlower.ir.kernels.attention` has the one for attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch.nn import functional

from bitlower.ir.activations import IN_KERNELS
from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.granularity import Granularity
from bitlower.ir.quantization.grid import Grid

aten = torch.ops.aten
Tensors = Sequence[torch.Tensor]


def read(x: torch.Tensor, scale: torch.Tensor | None, zero_point: torch.Tensor | None) -> torch.Tensor:
    """The value of an operand: codes are dequantized, floats are as they are."""
    if scale is None or zero_point is None:
        return x
    return numerics.values(x, scale, zero_point)


def rounded(x: torch.Tensor, scale: torch.Tensor | None, zero_point: torch.Tensor | None, grid: str) -> torch.Tensor:
    """``x`` rounded to a grid with stored scales; as it is without them."""
    if scale is None or zero_point is None:
        return x
    parsed = Grid.parse(grid)
    return numerics.fake(x, scale, zero_point, parsed.quant_min, parsed.quant_max)


def output_tensors(
    value: torch.Tensor,
    outputs: str,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    grid: str = "",
    **others: torch.Tensor,
) -> list[torch.Tensor]:
    """The tensors that ``outputs`` names, of the result ``value``; ``others`` are further ones by name."""
    tensors = {"value": value, **others}
    if grid:
        parsed = Grid.parse(grid)
        if scale is None or zero_point is None:
            scale, zero_point = parsed.qparams(*Granularity.per_token().range_of(value))
            tensors |= {"scale": scale, "zero_point": zero_point}
        codes = numerics.codes(value, scale, zero_point, parsed.quant_min, parsed.quant_max).to(parsed.dtype)
        tensors |= {"codes": codes, "rounded": numerics.values(codes, scale, zero_point)}
    return [tensors[name] for name in outputs.split()]


def like_outputs(x: torch.Tensor, shape: Sequence[int | torch.SymInt], outputs: str, grid: str) -> list[torch.Tensor]:
    """Empty tensors of the dtypes and shapes that :func:`output_tensors` returns for a result of ``shape``."""
    dtypes = {"codes": Grid.parse(grid).dtype} if grid else {}
    made = []
    for name in outputs.split():
        size = (*shape[:-1], 1) if name in ("scale", "zero_point") else tuple(shape)
        made.append(x.new_empty(size, dtype=dtypes.get(name, torch.float32)))
    return made


@torch.library.custom_op("bitlower::fused_linear", mutates_args=())
def _fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    rounded_scale: torch.Tensor | None = None,
    rounded_zero_point: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_scale: torch.Tensor | None = None,
    residual_zero_point: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    *,
    activation: str = "",
    rounded_grid: str = "",
    merged_n: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    out_grid: str = "",
    outputs: str = "value",
) -> list[torch.Tensor]:
    """A linear layer: ``round(activation(x̂ Ŵᵀ + bias)) + residual``, each part where it is given.

    - ``x``: ``[…, K]``, float32 or codes.
    - ``weight``: codes ``[N, K]``.
    - ``weight_scale``: of the weight: rank 0, ``[N, 1]``, ``[divisor of N, 1]``, ``[N, groups]``.
    - ``bias``: float32 ``[N]``.
    - ``x_scale``: of x: rank 0, ``[…, 1]`` (per token), or rank of x with one entry an index or block of K (groups).
    - ``activation``: one of :data:`~bitlower.ir.activations.IN_KERNELS`, or none.
    - ``rounded_scale``: of the grid ``rounded_grid``, to which the result is rounded before the residual is added.
    - ``residual``: ``[…, N]``, float32 or codes.
    - ``merged_n``: the sizes of the layers that were merged into this one, N in all; the outputs of each come after
      those of the one before. None: one layer.
    - ``columns``: the sizes of the slices of K whose products are summed one after the other; None: one slice.
    - ``out_scale``: of the result: rank 0, or its rank with one entry an index or block of N (an index if merged).
    - ``out_grid``: the grid of the result.
    - ``outputs``: what is given of each layer: ``value``, ``codes``, ``rounded``.
    """
    value, tensors, start = read(x, x_scale, x_zero_point), list[torch.Tensor](), 0
    for size in merged_n or (weight.shape[0],):
        part = slice(start, start + size)
        scales = [s if s.dim() == 0 or not merged_n else s[part] for s in (weight_scale, weight_zero_point)]
        matrix = numerics.values(weight[part] if merged_n else weight, *scales)
        y = _product(value, matrix, bias[part] if bias is not None and merged_n else bias, columns)
        y = IN_KERNELS[activation](y) if activation else y
        y = rounded(y, rounded_scale, rounded_zero_point, rounded_grid)
        if residual is not None:
            y = y + read(residual, residual_scale, residual_zero_point)
        stored = [s[..., part] if merged_n and s is not None and s.dim() else s for s in (out_scale, out_zero_point)]
        tensors += output_tensors(y, outputs, stored[0], stored[1], out_grid)
        start += size
    return tensors


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: Sequence[int] | None
) -> torch.Tensor:
    """``x Wᵀ + bias``; slices of the columns one after the other, the bias with the first."""
    if not columns:
        return functional.linear(x, weight, bias)
    parts = list(zip(*(torch.split(part, list(columns), -1) for part in (x, weight)), strict=True))
    total = functional.linear(parts[0][0].contiguous(), parts[0][1], bias)
    for part, block in parts[1:]:
        total = total + functional.linear(part.contiguous(), block)
    return total


@_fused_linear.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    *tensors: torch.Tensor | None,
    merged_n: Sequence[int] | None = None,
    out_grid: str = "",
    outputs: str = "value",
    **others: object,
) -> list[torch.Tensor]:
    sizes = merged_n or (weight.shape[0],)
    return [t for size in sizes for t in like_outputs(x, (*x.shape[:-1], size), outputs, out_grid)]


@torch.library.custom_op("bitlower::fused_norm", mutates_args=())
def _fused_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_scale: torch.Tensor | None = None,
    residual_zero_point: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    weight_zero_point: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    *,
    norm: str,
    eps: float | None,
    out_grid: str = "",
    outputs: str = "value",
) -> list[torch.Tensor]:
    """``norm(x + residual) · weight + bias`` over the last axis.

    Args:
        x: ``[…, K]``, float32 or codes.
        weight: ``[K]``, float32 or codes; None: ones.
        bias: float32 ``[K]``; None: zeros.
        norm: ``layer`` (LayerNorm) or ``rms`` (RMSNorm, which has no bias).
        eps: added to the variance, or to the mean square; None: float32's machine epsilon (``rms`` alone).
        x_scale: of x.
        x_zero_point: of x.
        residual: ``[…, K]``, float32 or codes; added to x first.
        residual_scale: of the residual.
        residual_zero_point: of the residual.
        weight_scale: of the weight.
        weight_zero_point: of the weight.
        out_scale: of the result.
        out_zero_point: of the result.
        out_grid: the grid of the result.
        outputs: what is given: ``sum`` (x + residual, float32), ``value``, ``codes``, ``scale``, ``zero_point``,
            ``rounded``.
    """
    value = read(x, x_scale, x_zero_point)
    others = {}
    if residual is not None:
        value = value + read(residual, residual_scale, residual_zero_point)
        others["sum"] = value
    gain = None if weight is None else read(weight, weight_scale, weight_zero_point)
    if norm == "layer":
        y = aten.layer_norm.default(value, [value.shape[-1]], gain, bias, eps, False)
    else:
        y = aten.rms_norm.default(value, [value.shape[-1]], gain, eps)
    return output_tensors(y, outputs, out_scale, out_zero_point, out_grid, **others)


@_fused_norm.register_fake
def _(
    x: torch.Tensor, *tensors: torch.Tensor | None, out_grid: str = "", outputs: str = "value", **others: object
) -> list[torch.Tensor]:
    return like_outputs(x, x.shape, outputs, out_grid)


@torch.library.custom_op("bitlower::fused_pointwise", mutates_args=())
def _fused_pointwise(
    x: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    x_zero_point: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    factor_scale: torch.Tensor | None = None,
    factor_zero_point: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    residual_scale: torch.Tensor | None = None,
    residual_zero_point: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    *,
    activation: str = "",
    heads: bool = False,
    out_grid: str = "",
    outputs: str = "value",
) -> list[torch.Tensor]:
    """``activation(x) · factor + residual``, each part where it is given.

    Args:
        x: of any shape, float32 or codes.
        x_scale: of x.
        x_zero_point: of x.
        activation: one of :data:`~bitlower.ir.activations.IN_KERNELS`, or none.
        factor: in the shape of x, float32 or codes: the other half of a gated feed-forward layer.
        factor_scale: of the factor.
        factor_zero_point: of the factor.
        residual: in the shape of x, float32 or codes.
        residual_scale: of the residual.
        residual_zero_point: of the residual.
        heads: x is ``[batch, heads, length, head_dim]``, and the result ``[batch, length, heads · head_dim]``.
        out_scale: of the result.
        out_zero_point: of the result.
        out_grid: the grid of the result.
        outputs: what is given: ``value``, ``codes``, ``scale``, ``zero_point``, ``rounded``.
    """
    y = read(x, x_scale, x_zero_point)
    y = IN_KERNELS[activation](y) if activation else y
    if factor is not None:
        y = y * read(factor, factor_scale, factor_zero_point)
    if residual is not None:
        y = y + read(residual, residual_scale, residual_zero_point)
    if heads:
        y = join_heads(y)
    return output_tensors(y, outputs, out_scale, out_zero_point, out_grid)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, length, head_dim]`` as a new tensor ``[batch, length, heads · head_dim]``."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)


@_fused_pointwise.register_fake
def _(
    x: torch.Tensor,
    *tensors: torch.Tensor | None,
    heads: bool = False,
    out_grid: str = "",
    outputs: str = "value",
    **others: object,
) -> list[torch.Tensor]:
    shape = (x.shape[0], x.shape[2], x.shape[1] * x.shape[3]) if heads else tuple(x.shape)
    return like_outputs(x, shape, outputs, out_grid)


@torch.library.custom_op("bitlower::fused_embedding", mutates_args=())
def _fused_embedding(
    ids: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    table_scales: Sequence[torch.Tensor],
    table_zero_points: Sequence[torch.Tensor],
    rounded_scales: Sequence[torch.Tensor],
    rounded_zero_points: Sequence[torch.Tensor],
    out_scale: torch.Tensor | None = None,
    out_zero_point: torch.Tensor | None = None,
    *,
    rounded_grid: str = "",
    out_grid: str = "",
    outputs: str = "value",
) -> list[torch.Tensor]:
    """The sum of rows of quantized tables, ``((t₀[i₀] + t₁[i₁]) + t₂[i₂]) + …``.

    Args:
        ids: int64, one tensor for each table; they broadcast to one shape.
        tables: codes ``[entries, K]``.
        table_scales: rank 0, ``[entries, 1]`` or ``[entries, groups]``, one for each table.
        table_zero_points: in the same shapes.
        rounded_scales: of the sums but the last, in order: each is rounded before the next table is added; or empty.
        rounded_zero_points: of those sums, rank 0 like their scales.
        rounded_grid: the grid of those sums.
        out_scale: of the result.
        out_zero_point: of the result.
        out_grid: the grid of the result.
        outputs: what is given: ``value``, ``codes``, ``scale``, ``zero_point``, ``rounded``.
    """
    rows = [_rows(*table) for table in zip(ids, tables, table_scales, table_zero_points, strict=True)]
    total = rows[0]
    for index, row in enumerate(rows[1:]):
        total = total + row
        if index < len(rounded_scales):
            total = rounded(total, rounded_scales[index], rounded_zero_points[index], rounded_grid)
    return output_tensors(total, outputs, out_scale, out_zero_point, out_grid)


def _rows(ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The values of the rows ``ids``, float32 ``[…, K]``; no other row is dequantized."""
    flat = ids.reshape(-1)
    scales = [s[flat // (table.shape[0] // s.shape[0])] if s.dim() else s for s in (scale, zero_point)]
    return numerics.values(table[flat], *scales).reshape(*ids.shape, -1)


@_fused_embedding.register_fake
def _(
    ids: Tensors,
    tables: Tensors,
    *tensors: Tensors | torch.Tensor | None,
    out_grid: str = "",
    outputs: str = "value",
    **others: object,
) -> list[torch.Tensor]:
    shape = reduce(torch.broadcast_shapes, [i.shape for i in ids])
    return like_outputs(ids[0], (*shape, tables[0].shape[1]), outputs, out_grid)


fused_linear = torch.ops.bitlower.fused_linear.default
fused_norm = torch.ops.bitlower.fused_norm.default
fused_pointwise = torch.ops.bitlower.fused_pointwise.default
fused_embedding = torch.ops.bitlower.fused_embedding.default
