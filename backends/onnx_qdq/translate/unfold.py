"""Convolutions of codes as linear layers over unfolded codes, which onnxruntime multiplies as integers.

Its Conv is an integer kernel only where the result is rounded to 8 bits too, and ConvInteger takes several times as
long as a float Conv. What every place of the kernel reads is put side by side instead (im2col, Chellapilla et al.
2006), codes of a byte each, and multiplied as all linears are; the sums are the same.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import fx

from bitlower.backends.onnx_qdq.translate.operands import float_reason, unviewed
from bitlower.ir import Program, TensorType, get_tensor, ops, set_tensor
from bitlower.ir.dataflow import VIEWS, convolutions
from bitlower.ir.operators import ConvNode, operand
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.rewrite import call_again, call_like
from bitlower.ir.types import Dim

aten = torch.ops.aten
MOST_PLACES = 25
"""Kernels of more places are computed in float: so many copies of the input take longer to write than to multiply."""


def conv_reason(node: fx.Node) -> str:
    """Why a convolution is computed in float; empty if it is one of integers."""
    conv = ConvNode(node)
    if reason := float_reason(conv.x, conv.weight):
        return reason
    if conv.weight.target is not ops.dequantize or len(conv.weight.users) > 1:
        return "the kernel of a convolution is read elsewhere too"
    inputs, kernel = (QuantizerNode(value).spec.granularity for value in (unviewed(conv.x), conv.weight))
    if inputs.kind != "tensor" or kernel.axis != 0:
        return "scales do not factor out of a convolution"
    if not conv.has_batch:
        return "the input of a convolution has no batch"
    if conv.groups > 1:
        return "a convolution runs in groups of channels"
    if math.prod(conv.kernel) > MOST_PLACES:
        return f"the kernel of a convolution has more than {MOST_PLACES} places"
    return ""


def unfold_convolutions(program: Program) -> Program:
    """``program`` with linear layers over unfolded codes for its convolutions of integers.

    A copy with the same tensors, or ``program`` itself where there are none.
    """
    if all(map(conv_reason, convolutions(program.graph))):
        return program
    copy = program.clone()
    for node in convolutions(copy.graph):
        if not conv_reason(node):
            _unfold(copy, ConvNode(node))
    copy.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return copy


def unfolded_kernel(kernel: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A kernel ``[out, channels, …]`` as the matrix ``[out, places · channels]`` that unfolded codes meet."""
    return np.moveaxis(kernel, 1, -1).reshape(len(kernel), -1)


def _unfold(program: Program, conv: ConvNode) -> None:
    node, kind = conv.node, conv.node.meta["type"]
    with node.graph.inserting_before(node):
        weight = _matrix(program, conv)
        columns = _columns(program, conv, tuple(kind.shape[2:]))
        args = (columns, weight, *((conv.bias,) if conv.bias is not None else ()))
        order = [0, *range(2, kind.rank), 1]
        shape = tuple(kind.shape[axis] for axis in order)
        linear = call_like(node, aten.linear.default, args, TensorType(kind.dtype, shape))
        back = [0, kind.rank - 1, *range(1, kind.rank - 1)]
        result = call_like(node, aten.permute.default, (linear, back), kind)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _matrix(program: Program, conv: ConvNode) -> fx.Node:
    """The weight as a matrix: codes, scales and zero points under their own names."""
    view = QuantizerNode(conv.weight)
    made = []
    for source in (view.value, view.scale, view.zero_point):
        tensor = get_tensor(program.module, str(source.target)).detach()
        if tensor.dim() > 1:
            tensor = torch.from_numpy(np.ascontiguousarray(unfolded_kernel(tensor.numpy())))
            set_tensor(program.module, str(source.target), tensor)
        part = conv.node.graph.get_attr(str(source.target))
        part.meta["type"] = TensorType(tensor.dtype, tuple(tensor.shape))
        made.append(part)
    kind = TensorType(conv.weight.meta["type"].dtype, made[0].meta["type"].shape)
    weight = call_like(conv.node, ops.dequantize, tuple(made), kind)
    weight.meta["quantizer"] = view.quantizer
    return weight


def _columns(program: Program, conv: ConvNode, places: tuple[Dim, ...]) -> fx.Node:
    """What each place of the kernel reads, ``[batch, …, places · channels]``."""
    code, view = _codes(conv.x)
    kind: TensorType = code.meta["type"]
    rank, node = kind.rank, conv.node
    order = [0, *range(2, rank), 1]
    rows = _call(node, aten.permute.default, (code, order), code, [kind.shape[axis] for axis in order])
    zero = int(get_tensor(program.module, str(view.zero_point.target)))
    rows = _padded(conv, rows, zero)
    parts = []
    for place in itertools.product(*map(range, conv.kernel)):
        part = rows
        for axis, (index, size) in enumerate(zip(place, places, strict=True)):
            part = _steps(conv, part, axis, index, size)
        parts.append(part)
    width = len(parts) * int(kind.shape[1])
    columns = _call(node, aten.cat.default, (parts, -1), code, [kind.shape[0], *places, width])
    shape = columns.meta["type"].shape
    real = call_like(node, ops.dequantize, (columns, view.scale, view.zero_point), TensorType(torch.float32, shape))
    real.meta["quantizer"] = view.quantizer
    return real


def _codes(x: fx.Node) -> tuple[fx.Node, QuantizerNode]:
    """The codes of an activation, as the views between its quantizer and ``x`` give them."""
    if x.target not in VIEWS:
        return QuantizerNode(x).value, QuantizerNode(x)
    code, view = _codes(operand(x, "self"))
    return call_again(x, code, x.meta["type"].with_dtype(code.meta["type"].dtype)), view


def _padded(conv: ConvNode, rows: fx.Node, zero: int) -> fx.Node:
    """``rows`` with the code of zero around them."""
    if not conv.is_padded:
        return rows
    counts = [0, 0, *(count for pair in reversed(conv.padding) for count in pair)]
    batch, *sizes, channels = rows.meta["type"].shape
    wide = [_sum(size, sum(pair)) for size, pair in zip(sizes, conv.padding, strict=True)]
    return _call(conv.node, aten.constant_pad_nd.default, (rows, counts, zero), rows, [batch, *wide, channels])


def _steps(conv: ConvNode, rows: fx.Node, axis: int, index: int, size: Dim) -> fx.Node:
    """What the kernel's entry ``index`` along an axis reads at all of its ``size`` steps."""
    reach = conv.dilation[axis] * (conv.kernel[axis] - 1)
    start = conv.dilation[axis] * index
    shape = list(rows.meta["type"].shape)
    shape[axis + 1] = size
    end = start - reach or 2**63 - 1
    args = (rows, axis + 1, start, end, conv.stride[axis])
    return _call(conv.node, aten.slice.Tensor, args, rows, shape)


def _sum(size: Dim, count: int) -> Dim:
    return size + count if isinstance(size, int) else f"{size} + {count}"


def _call(node: fx.Node, target: Any, args: tuple[Any, ...], code: fx.Node, shape: list[Dim]) -> fx.Node:
    """A call on codes, of the type of ``code`` and of ``shape``."""
    return call_like(node, target, args, TensorType(code.meta["type"].dtype, tuple(shape)))
