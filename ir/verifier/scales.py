"""Checks wherever a graph rounds or holds codes: the layout and range of scales, stored codes; part of the verifier."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import fx

from bitlower.ir.diagnostics import BitlowerError, CheckError, describe
from bitlower.ir.quantization.granularity import Granularity
from bitlower.ir.quantization.grid import Grid, ScaleConvention
from bitlower.ir.storage import release
from bitlower.ir.tensors import get_tensor
from bitlower.ir.types import TensorType


def fail(node: fx.Node, message: str, *, hint: str = "") -> NoReturn:
    """Raise a CheckError about ``node``."""
    raise CheckError(f"{describe(node)}: {message}", hint=hint)


def type_of(module: fx.GraphModule, node: fx.Node) -> TensorType:
    """The type of ``node``, or that of the tensor which it reads."""
    kind = node.meta.get("type")
    if isinstance(kind, TensorType):
        return kind
    if node.op != "get_attr":
        fail(node, "has no type")
    tensor = get_tensor(module, str(node.target))
    return TensorType(tensor.dtype, tuple(tensor.shape))


def identity(node: object) -> object:
    """What an argument stands for: a stored tensor by its name, everything else by itself."""
    return node.target if isinstance(node, fx.Node) and node.op == "get_attr" else node


def check_layout(
    node: fx.Node, granularity: Granularity, kind: TensorType, scale: torch.Tensor, zero_point: torch.Tensor
) -> None:
    """Scale and zero point of a tensor of type ``kind`` are float32 in the shape that ``granularity`` says."""
    try:
        expected = granularity.scale_shape(kind.shape)
    except BitlowerError as error:
        fail(node, str(error))
    for what, tensor in (("scale", scale), ("zero point", zero_point)):
        if tuple(tensor.shape) != expected or tensor.dtype != torch.float32:
            layout = TensorType(tensor.dtype, tuple(tensor.shape))
            fail(node, f"its {what} is {layout}, {granularity} of {kind} takes {TensorType(torch.float32, expected)}")


def check_range(node: fx.Node, grid: Grid, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """Scales are finite and above zero, zero points are whole numbers that the grid allows."""
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        fail(node, "has a scale that is negative or not finite")
    if not bool(scale.all()):
        fail(node, "has a scale of zero", hint="run `calibrate` before it is lowered")
    if not torch.equal(zero_point, torch.round(zero_point)):
        fail(node, "has a zero point that is no whole number")
    low, high = _zero_points(grid)
    if bool((zero_point < low).any()) or bool((zero_point > high).any()):
        fail(node, f"has a zero point outside [{low}, {high}], which the grid {grid} allows")


def _zero_points(grid: Grid) -> tuple[int, int]:
    """The smallest and the largest zero point of ``grid``: symmetric grids have one."""
    if not grid.symmetric:
        return grid.quant_min, grid.quant_max
    zero = 2 ** (grid.bits - 1) if grid.convention is ScaleConvention.OFFSET else 0
    return zero, zero


def check_stored_codes(module: fx.GraphModule, node: fx.Node, source: fx.Node, grid: Grid) -> None:
    """The stored tensor that ``source`` reads has the grid's dtype and lies inside the grid."""
    codes = get_tensor(module, str(source.target))
    if codes.dtype != grid.dtype:
        fail(node, f"the codes {source.target!r} are {codes.dtype}, the grid {grid} is held in {grid.dtype}")
    array = codes.detach().cpu().numpy()
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    release(codes)
    if low < grid.quant_min or high > grid.quant_max:
        fail(node, f"the codes {source.target!r} are in [{low}, {high}], outside the grid {grid}")
