"""Convolutions of size 1 are linear layers over the channels, and become them; those with groups one a group."""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir import TensorType, get_tensor, set_tensor
from bitlower.ir.dataflow import CONVOLUTION
from bitlower.ir.operators import ConvNode, argument, operand
from bitlower.ir.rewrite import Rule, call_like

aten = torch.ops.aten
_PERMUTES = frozenset({aten.transpose.int, aten.permute.default})
_GROUPS = 16
"""The most groups that become linear layers of their own."""


def fold_pointwise(module: fx.GraphModule, node: fx.Node) -> fx.Node | str:
    """Replace ``conv(x [batch, channels, …], w [out, in, 1, …])`` by ``linear`` over ``[batch, …, channels]``.

    The weight is stored as ``[out, in]`` under its own name; that of ``groups`` as one matrix a group, called after it
    with the group's number.
    """
    reason = _refusal(module, node)
    if reason:
        return reason
    conv, kind = ConvNode(node), node.meta["type"]
    x, weight, groups = conv.x, conv.weight, conv.groups
    last = [0, *range(2, kind.rank), 1]
    weights, biases = stored_parts(module, weight, groups), stored_parts(module, conv.bias, groups)
    with node.graph.inserting_before(node):
        rows = reordered(node, x, last)
        width = weights[0].meta["type"].shape
        outputs = []
        for group in range(groups):
            part = rows if groups == 1 else _part(node, rows, group * width[1], (group + 1) * width[1])
            args = (part, weights[group], *((biases[group],) if biases else ()))
            shape = (*rows.meta["type"].shape[:-1], width[0])
            outputs.append(call_like(node, aten.linear.default, args, TensorType(kind.dtype, shape)))
        whole = outputs[0]
        if groups > 1:
            shape = (*rows.meta["type"].shape[:-1], kind.shape[1])
            whole = call_like(node, aten.cat.default, (outputs, -1), TensorType(kind.dtype, shape))
        result = reordered(node, whole, [0, kind.rank - 1, *range(1, kind.rank - 1)])
    node.replace_all_uses_with(result)
    return result


def _refusal(module: fx.GraphModule, node: fx.Node) -> str:
    """Why a convolution is no linear layer, or is not made one; empty if it is."""
    conv = ConvNode(node)
    if set(conv.kernel) != {1}:
        return f"its kernel has the size {'×'.join(map(str, conv.kernel))}"
    if not conv.has_batch:
        return "its input has no batch"
    if set(conv.stride) != {1} or conv.is_padded:
        return "it has a stride or a padding"
    if reason := shared_weight(module, node):
        return reason
    if conv.groups > _GROUPS or (conv.groups > 1 and conv.weight.meta["type"].shape[1] == 1):
        return f"its {conv.groups} groups are too many for linear layers of their own"
    return ""


def shared_weight(module: fx.GraphModule, node: fx.Node) -> str:
    """Why the weight of a convolution cannot be stored in another shape; empty if it can."""
    weight, bias = ConvNode(node).weight, ConvNode(node).bias
    if any(part.op != "get_attr" for part in (weight, bias) if part is not None):
        return "its weight is computed"
    readers = [user for holder in module.graph.find_nodes(op="get_attr", target=weight.target) for user in holder.users]
    return "" if readers == [node] else "its weight is read elsewhere too"


def stored_parts(module: fx.GraphModule, parameter: fx.Node | None, groups: int) -> list[fx.Node]:
    """The parameter (none: an empty list) as matrices ``[out, in · sizes of the kernel]``, one a group, as nodes."""
    if parameter is None:
        return []
    name = str(parameter.target)
    tensor = get_tensor(module, name)
    if groups == 1 and tensor.dim() == 1:
        return [parameter]
    flat = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach()
    parts = [flat] if groups == 1 else [part.contiguous() for part in flat.chunk(groups)]
    nodes = []
    for group, part in enumerate(parts):
        target = name if groups == 1 else f"{name}_{group}"
        stored = torch.nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else part
        set_tensor(module, target, stored)
        with module.graph.inserting_before(parameter):
            attribute = module.graph.get_attr(target)
        attribute.meta = dict(parameter.meta) | {"type": TensorType(part.dtype, tuple(part.shape))}
        nodes.append(attribute)
    return nodes


def reordered(like: fx.Node, value: fx.Node, order: list[int]) -> fx.Node:
    """``value`` with its axes in another order; what ``value`` was before it was moved the other way, if it was."""
    if value.target in _PERMUTES:
        before = operand(value, "self")
        if [_order(value)[axis] for axis in order] == list(range(len(order))):
            return before
    kind = value.meta["type"]
    shape: tuple[int | str, ...] = tuple(kind.shape[axis] for axis in order)
    return call_like(like, aten.permute.default, (value, order), TensorType(kind.dtype, shape))


def _order(node: fx.Node) -> list[int]:
    """The order that a transpose or permutation puts the axes in."""
    rank = node.meta["type"].rank
    if node.target is aten.permute.default:
        return [axis % rank for axis in argument(node, "dims")]
    order = list(range(rank))
    first, second = (argument(node, name) % rank for name in ("dim0", "dim1"))
    order[first], order[second] = second, first
    return order


def _part(like: fx.Node, rows: fx.Node, start: int, stop: int) -> fx.Node:
    kind = rows.meta["type"]
    shape = (*kind.shape[:-1], stop - start)
    return call_like(like, aten.slice.Tensor, (rows, kind.rank - 1, start, stop), TensorType(kind.dtype, shape))


def undo_permutation(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Drop a transpose or permutation that takes back the one before it."""
    inner = operand(node, "self")
    if inner.target not in _PERMUTES:
        return None
    first, second = _order(inner), _order(node)
    if [first[axis] for axis in second] != list(range(len(first))):
        return None
    node.replace_all_uses_with(operand(inner, "self"))
    return operand(inner, "self")


RULES = (
    Rule("pointwise-convolution", CONVOLUTION, fold_pointwise),
    Rule("permutation-and-back", _PERMUTES, undo_permutation),
)
