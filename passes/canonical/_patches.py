"""Convolutions over patches that do not overlap are linear layers over the patches, and become them."""

from __future__ import annotations

import math

import torch
from torch import fx

from bitlower.ir import TensorType
from bitlower.ir.dataflow import CONVOLUTION
from bitlower.ir.operators import ConvNode
from bitlower.ir.rewrite import Rule, call_like
from bitlower.passes.canonical._conv import reordered, shared_weight, stored_parts

aten = torch.ops.aten


def unfold_patches(module: fx.GraphModule, node: fx.Node) -> fx.Node | str | None:
    """Replace ``conv(x [batch, channels, height, width], w [out, channels, k, l], stride [k, l])`` by a ``linear``.

    It runs over ``[batch, height/k, width/l, channels·k·l]``; the weight is stored as ``[out, channels·k·l]`` under its
    own name. The patch embeddings of vision transformers are of that kind (Dosovitskiy et al. 2021, §3.1).
    """
    conv = ConvNode(node)
    if set(conv.kernel) == {1} or conv.stride != conv.kernel or conv.groups != 1:
        return None
    reason = _refusal(conv) or shared_weight(module, node)
    if reason:
        return reason
    [weight], kind = stored_parts(module, conv.weight, 1), node.meta["type"]
    with node.graph.inserting_before(node):
        args = (_patches(conv), weight, *((conv.bias,) if conv.bias is not None else ()))
        last = [0, *range(2, kind.rank), 1]
        rows = TensorType(kind.dtype, tuple(kind.shape[axis] for axis in last))
        linear = call_like(node, aten.linear.default, args, rows)
        result = reordered(node, linear, [0, kind.rank - 1, *range(1, kind.rank - 1)])
    node.replace_all_uses_with(result)
    return result


def _refusal(conv: ConvNode) -> str:
    """Why patches as large as the steps between them are no rows of a linear layer; empty if they are."""
    if conv.is_padded:
        return "it has a padding"
    if set(conv.dilation) != {1}:
        return "its patches have gaps"
    if not conv.has_batch:
        return "its input has no batch"
    for size, step in zip(conv.x.meta["type"].shape[2:], conv.kernel, strict=True):
        if not isinstance(size, int):
            return f"its input has the dynamic size {size}"
        if size % step:
            return f"patches of {step} do not divide the size {size}"
    return ""


def _patches(conv: ConvNode) -> fx.Node:
    """The input of a convolution as ``[batch, patches along each axis …, channels · sizes of a patch]``."""
    kernel, node = conv.kernel, conv.node
    batch, channels, *sizes = conv.x.meta["type"].shape
    counts = [int(size) // step for size, step in zip(sizes, kernel, strict=True)]
    split = [channels, *(part for pair in zip(counts, kernel, strict=True) for part in pair)]
    places = range(2, 2 + 2 * len(kernel))
    cut = _reshape(node, conv.x, (batch, *split))
    apart = reordered(node, cut, [0, *places[::2], 1, *places[1::2]])
    return _reshape(node, apart, (batch, *counts, int(channels) * math.prod(kernel)))


def _reshape(node: fx.Node, value: fx.Node, shape: tuple[int | str, ...]) -> fx.Node:
    """``value`` in another shape, of which one size at most is symbolic."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return call_like(node, aten.reshape.default, (value, sizes), TensorType(value.meta["type"].dtype, shape))


RULES = (Rule("patches", CONVOLUTION, unfold_patches),)
