"""One form of linear layer: ``linear(x, weight [out, in], bias)`` over ``[batch, sequence, channels]``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from bitlower.ir import TensorType, get_tensor, set_tensor
from bitlower.ir.dataflow import ACTIVATION, NORM
from bitlower.ir.operators import BinaryNode, LinearNode, argument, operand, swapped_axes, value_operands
from bitlower.ir.rewrite import Rule, call_like, replace

aten = torch.ops.aten
_PRODUCTS = frozenset({aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default})
_BINARY = frozenset({aten.add.Tensor, aten.mul.Tensor})
_ROW_WISE = ACTIVATION | _BINARY | {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default}
"""Operators that treat every token alike, however tokens are laid out."""


def orient_linear(module: fx.GraphModule, node: fx.Node) -> fx.Node | str | None:
    """Turn a product with a stored matrix into a ``linear`` over a weight ``[out, in]``.

    A matrix that lies as ``[in, out]`` (GPT-2's Conv1D, ``x @ w``) is transposed in the module, under its own name, if
    all of its readers multiply with it in that way. What is read both ways stays as it is.
    """
    operands = _operands(node)
    if isinstance(operands, str) or operands is None:
        return operands
    x, matrix, bias = operands
    parameter = _stored(matrix)
    if parameter is None or (node.target is aten.linear.default and matrix is parameter):
        return None
    if not _is_across(node, matrix):
        return _as_linear(node, x, parameter, bias)
    uses = list(_uses(module, parameter))
    if not all(_multiplies_across(user, matrix) for user, matrix in uses):
        return f"{parameter.target} is also read in the other orientation"
    _transpose(module, parameter)
    linears = [_as_linear(user, product[0], parameter, product[2]) for user, _ in uses if (product := _product(user))]
    return linears[0]


def turn_product(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Turn ``w @ xᵀ`` with a stored matrix ``w`` into ``linear(x, w)ᵀ`` (the time steps of Mamba)."""
    weight, turned = BinaryNode(node).left, BinaryNode(node).right
    kind: TensorType = node.meta["type"]
    if weight.op != "get_attr" or weight.meta["type"].rank != 2 or kind.rank < 3:
        return None
    last = (kind.rank - 2, kind.rank - 1)
    if turned.target is not aten.transpose.int or tuple(sorted(swapped_axes(turned))) != last:
        return None
    shape = (*kind.shape[:-2], kind.shape[-1], kind.shape[-2])
    with node.graph.inserting_before(node):
        args = (operand(turned, "self"), weight)
        linear = call_like(node, aten.linear.default, args, TensorType(kind.dtype, shape))
    return replace(node, aten.transpose.int, (linear, -2, -1), kind)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, Any] | str | None:
    """Activation, matrix and bias of a product; why it is no linear layer; None where it multiplies with no matrix."""
    if node.target is aten.addmm.default:
        x, matrix, bias = LinearNode(node).x, LinearNode(node).weight, operand(node, "self")
        if set(node.kwargs.values()) - {1}:
            return "it scales the product or what it adds"
        return (x, matrix, bias) if bias.meta["type"].rank == 1 else "what it adds is no vector"
    linear = LinearNode(node) if node.target is aten.linear.default else None
    x, matrix = (linear.x, linear.weight) if linear else (BinaryNode(node).left, BinaryNode(node).right)
    if matrix.meta["type"].rank != 2 or x.meta["type"].rank < 2:
        return None
    return x, matrix, linear.bias if linear else None


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, Any] | None:
    """Activation, matrix and bias of ``node`` if it is a product that can be a linear."""
    operands = _operands(node) if node.target in _PRODUCTS else None
    return operands if isinstance(operands, tuple) else None


def _stored(matrix: fx.Node) -> fx.Node | None:
    """The stored tensor that ``matrix`` is, or is the transpose of."""
    source = operand(matrix, "self") if _is_transpose(matrix) else matrix
    return source if source.op == "get_attr" else None


def _is_transpose(node: fx.Node) -> bool:
    """Whether ``node`` swaps the two axes of a matrix."""
    if node.target is aten.transpose.int:
        return bool(node.meta["type"].rank == 2) and len(swapped_axes(node)) == 2
    if node.target is aten.numpy_T.default:
        return bool(node.meta["type"].rank == 2)
    return node.target is aten.t.default or (node.target is aten.permute.default and argument(node, "dims") == [1, 0])


def _is_across(node: fx.Node, matrix: fx.Node) -> bool:
    """Whether the product runs over the first axis of the stored tensor, which then lies as ``[in, out]``."""
    return (node.target is aten.linear.default) == _is_transpose(matrix)


def _uses(module: fx.GraphModule, parameter: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who reads the parameter, and what it reads: the parameter or a transpose of it."""
    for holder in module.graph.find_nodes(op="get_attr", target=parameter.target):
        for user in holder.users:
            if _is_transpose(user):
                yield from ((reader, user) for reader in user.users)
            else:
                yield user, holder


def _multiplies_across(user: fx.Node, matrix: fx.Node) -> bool:
    product = _product(user)
    return product is not None and product[1] is matrix and product[2] is not matrix and _is_across(user, matrix)


def _transpose(module: fx.GraphModule, parameter: fx.Node) -> None:
    """Store the parameter the other way round, under its own name."""
    name = str(parameter.target)
    old = get_tensor(module, name)
    new = old.detach().t().contiguous()
    set_tensor(module, name, torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new)
    for holder in module.graph.find_nodes(op="get_attr", target=name):
        holder.meta["type"] = TensorType(new.dtype, tuple(new.shape))


def _as_linear(node: fx.Node, x: fx.Node, weight: fx.Node, bias: Any) -> fx.Node:
    args = (x, weight) if bias is None else (x, weight, bias)
    return replace(node, aten.linear.default, args, node.meta["type"])


def lift_rows(module: fx.GraphModule, node: fx.Node) -> fx.Node | str | None:
    """Let a token-wise operator work on ``[batch, sequence, channels]`` instead of a view ``[rows, channels]`` of it.

    The view moves behind the operator, and so from one to the next, until it meets the view that takes it back.
    """
    binary = node.target in _BINARY
    values = value_operands(node) if binary else node.all_input_nodes[:1]
    sources = {a: _unflattened(a) for a in values if not binary or _rank(a) > 1}
    unflattened = [source for source in sources.values() if source is not None]
    if not unflattened:
        return None
    lead = unflattened[0].meta["type"].shape[:-1]
    kind = node.meta["type"]
    if len(unflattened) < len(sources) or any(source.meta["type"].shape[:-1] != lead for source in unflattened):
        return "its operands are not views of one layout"
    if node.target in NORM and argument(node, "normalized_shape") != [kind.shape[-1]]:
        return "it normalizes rows together"
    args = tuple(sources.get(a) or a if isinstance(a, fx.Node) else a for a in node.args)
    with node.graph.inserting_before(node):
        lifted = call_like(node, node.target, args, TensorType(kind.dtype, (*lead, kind.shape[-1])), **node.kwargs)
        flat = call_like(node, aten.reshape.default, (lifted, [-1, kind.shape[-1]]), kind)
    node.replace_all_uses_with(flat)
    return lifted


def _rank(node: fx.Node) -> int:
    """The rank of a tensor; 0 for a size."""
    return node.meta["type"].rank if "type" in node.meta else 0


def _unflattened(node: fx.Node) -> fx.Node | None:
    """What ``node`` is a view ``[rows, channels]`` of, if that has more axes."""
    if node.target is not aten.reshape.default or _rank(node) != 2:
        return None
    source = operand(node, "self")
    shape, flat = source.meta["type"].shape, node.meta["type"].shape
    return source if len(shape) > 2 and isinstance(flat[-1], int) and shape[-1] == flat[-1] else None


def free_view(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Let a view be a ``reshape``: it asks for no memory layout, which the other rules do not keep."""
    node.target = aten.reshape.default
    return node


def undo_view(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Drop a view that takes back the one before it."""
    inner = operand(node, "self")
    if inner.target is not aten.reshape.default or operand(inner, "self").meta["type"] != node.meta["type"]:
        return None
    node.replace_all_uses_with(operand(inner, "self"))
    return operand(inner, "self")


RULES = (
    Rule("view", frozenset({aten.view.default, aten._unsafe_view.default}), free_view),
    Rule("linear-from-the-left", frozenset({aten.matmul.default}), turn_product),
    Rule("linear-orientation", _PRODUCTS, orient_linear),
    Rule("token-rows", _ROW_WISE, lift_rows),
    Rule("view-and-back", frozenset({aten.reshape.default}), undo_view),
)
