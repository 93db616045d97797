"""The stages that fusions are made of: what may follow an operator into its kernel."""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.activations import activation_of
from bitlower.ir.dataflow import ADD, is_float
from bitlower.ir.operators import operand, set_argument, swapped_axes, value_operands
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.rewrite import sole_user
from bitlower.passes.lowering._fusion import Match, round_trip

aten = torch.ops.aten
MULTIPLY = frozenset({aten.mul.Tensor})
ROWS = "every token gets a scale of its own, and this kernel does not hold whole rows"


def activation_name(node: fx.Node | None) -> str:
    """What kernels call the activation function that ``node`` is; empty if it is none of theirs."""
    row = activation_of(node)
    return row.name if row else ""


def is_per_token(value: fx.Node) -> bool:
    """Whether ``value`` is quantized with a scale for each token."""
    return any(user.target is ops.choose_qparams for user in value.users)


def gated(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The product that alone reads ``value``, and its other factor of the same type, if that is an activation too."""
    return _joined_with(value, MULTIPLY)


def added(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum that alone reads ``value``, and its other term of the same type."""
    return _joined_with(value, ADD)


def _joined_with(value: fx.Node, targets: frozenset[object]) -> tuple[fx.Node, fx.Node] | None:
    user = sole_user(value)
    if user is None or user.target not in targets or user.kwargs:
        return None
    others = [other for other in value_operands(user) if other is not value]
    if len(others) != 1 or others[0].op == "get_attr":
        return None
    kinds = {node.meta.get("type") for node in (value, others[0], user)}
    return (user, others[0]) if len(kinds) == 1 and is_float(user) else None


def take_activation(match: Match) -> str:
    """An activation function, unless it is the first factor of a product or quantized per token."""
    user = sole_user(match.value)
    name = activation_name(user)
    if user is None or not name or gated(user):
        return ""
    if is_per_token(user):
        return f"{name} is left to a kernel of its own: {ROWS}"
    match.arguments["activation"] = name
    match.take(user)
    return ""


def take_residual(match: Match) -> str:
    """The sum with another value, behind a rounding if there is one."""
    trip = round_trip(match.value)
    addition = added(trip[1] if trip else match.value)
    if addition is None:
        return ""
    if trip:
        match.round("rounded", trip[0])
        match.take(*trip)
    total, other = addition
    match.at = total
    match.read("residual", other)
    match.take(total)
    return ""


def take_factor(match: Match) -> str:
    """The product with another value."""
    multiplication = gated(match.value)
    if multiplication is not None:
        product, other = multiplication
        match.at = product
        match.read("factor", other)
        match.take(product)
    return ""


def take_heads(match: Match) -> str:
    """The joining of heads, unless what comes out is quantized per token."""
    sink_rounding(match.value)
    chain = joining(match.value)
    if not chain:
        return ""
    if is_per_token(chain[-1]):
        return f"heads are joined by a kernel of its own: {ROWS}"
    match.arguments["heads"] = True
    match.at = chain[-1]
    match.take(*chain)
    return ""


def joining(value: fx.Node) -> list[fx.Node]:
    """The views that alone read ``[batch, heads, length, head_dim]``, and join the heads."""
    turned = sole_user(value)
    if turned is None or value.meta["type"].rank != 4 or swapped_axes(turned) != {1, 2}:
        return []
    chain, last = [turned], sole_user(turned)
    if last is not None and last.target in (aten.contiguous.default, aten.clone.default):
        chain, last = [*chain, last], sole_user(last)
    if last is None or last.target not in (aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        return []
    batch, heads, length, head_dim = value.meta["type"].shape
    whole = isinstance(heads, int) and isinstance(head_dim, int) and last.meta["type"].shape == (
        batch, length, heads * head_dim
    )  # fmt: skip
    return [*chain, last] if whole else []


def sink_rounding(value: fx.Node) -> None:
    """Put the ``quantize`` and ``dequantize`` of ``value``, with one scale, behind the joining of heads."""
    trip = round_trip(value)
    if trip is None or QuantizerNode(trip[0]).scale.meta["type"].rank:
        return
    chain = joining(trip[1])
    if not chain:
        return
    quantize, dequantize = trip
    last = chain[-1]
    readers = list(last.users)
    chain[0].replace_input_with(dequantize, value)
    last.append(quantize)
    quantize.append(dequantize)
    set_argument(quantize, "x", last)
    for node, source in ((quantize, last), (dequantize, last)):
        node.meta["type"] = source.meta["type"].with_dtype(node.meta["type"].dtype)
    for reader in readers:
        reader.replace_input_with(last, dequantize)


def take_quantize(match: Match) -> str:
    """The rounding of the result with stored scales."""
    quantize, reason = _quantizer(match.value)
    if quantize is None or reason:
        return reason
    if not QuantizerNode(quantize).is_static:
        return f"its result is quantized outside: {ROWS}"
    _round_result(match, quantize)
    return ""


def take_any_quantize(match: Match) -> str:
    """The rounding of the result with stored scales, or with a scale for each token."""
    quantize, reason = _quantizer(match.value)
    if quantize is None or reason:
        return reason
    view = QuantizerNode(quantize)
    if not view.is_static:
        match.results[0] |= {"scale": view.scale, "zero_point": view.zero_point}
        match.fused_nodes.append(operand(view.scale, "source"))
    _round_result(match, quantize)
    return ""


def _quantizer(value: fx.Node) -> tuple[fx.Node | None, str]:
    """The node that quantizes ``value``, and why it cannot be taken."""
    quantizers = [user for user in value.users if user.target is ops.quantize]
    if len(quantizers) > 1:
        return None, f"its result is quantized in {len(quantizers)} ways"
    return (quantizers[0] if quantizers else None), ""


def _round_result(match: Match, quantize: fx.Node) -> None:
    match.round("out", quantize)
    match.results[0] |= {"value": match.value, "codes": quantize}
    match.fused_nodes.append(quantize)
