"""All fusions: which operators become which kernel."""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir import kernels, ops
from bitlower.ir.activations import ACTIVATIONS
from bitlower.ir.dataflow import ADD, EMBEDDING, NORM, is_float
from bitlower.ir.operators import EmbeddingNode, NormNode, argument, operand, value_operands
from bitlower.passes.lowering._fusion import Fusion, Match, round_trip, stored_codes
from bitlower.passes.lowering._fusion_attention import ATTENTIONS, start_attention
from bitlower.passes.lowering._fusion_merge import start_linear
from bitlower.passes.lowering._fusion_rotary import start_rotary
from bitlower.passes.lowering._fusion_stages import (
    MULTIPLY,
    activation_name,
    added,
    joining,
    take_activation,
    take_any_quantize,
    take_factor,
    take_heads,
    take_quantize,
    take_residual,
)

aten = torch.ops.aten


def start_norm(match: Match) -> str | None:
    """LayerNorm or RMSNorm over the last axis, with the sum before it that no linear has taken."""
    node = match.root
    if node.target is aten.native_layer_norm.default:
        return "it gives mean and deviation too"
    if len(argument(node, "normalized_shape")) != 1:
        return "it is over several axes"
    norm = NormNode(node)
    if norm.weight is not None and stored_codes(norm.weight):
        match.read("weight", norm.weight)
    else:
        match.arguments["weight"] = norm.weight
    match.arguments |= {"bias": norm.bias, "norm": "rms" if norm.is_rms else "layer", "eps": norm.epsilon}
    total = norm.x
    terms = _terms(total)
    if terms is not None and any(user < node for user in total.users):
        match.reasons.append("the sum is not added in the same kernel: something between reads it")
        terms = None
    match.read("x", terms[0] if terms else total)
    if terms:
        match.read("residual", terms[1])
        match.fused_nodes.append(total)
        match.results[0]["sum"] = total
    return ""


def _terms(total: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values of one type whose sum ``total`` is, if it is such a sum."""
    if total.target not in ADD or total.kwargs:
        return None
    terms = [term for term in value_operands(total) if is_float(term) and term.op != "get_attr"]
    if len(terms) != 2:
        return None
    return (terms[0], terms[1]) if all(term.meta["type"] == total.meta["type"] for term in terms) else None


def start_activation(match: Match) -> str | None:
    """An activation function that no linear has taken."""
    name = activation_name(match.root)
    if not name:
        return "kernels have no such form of it"
    match.arguments["activation"] = name
    match.read("x", operand(match.root, "self"))
    return ""


def start_sum(match: Match) -> str | None:
    """A sum of two values that no linear and no norm has taken, if it is quantized."""
    terms = _terms(match.root)
    if terms is None or not any(user.target is ops.quantize for user in match.root.users):
        return None
    match.read("x", terms[0])
    match.read("residual", terms[1])
    return ""


def start_joining(match: Match) -> str | None:
    """Heads that no attention has joined."""
    source = operand(match.root, "self")
    chain = joining(source)
    if not chain or chain[0] is not match.root:
        return None
    match.arguments["heads"] = True
    match.at = chain[-1]
    match.read("x", source)
    match.take(*chain[1:])
    return "" if any(user.target is ops.quantize for user in match.value.users) else None


def start_embedding(match: Match) -> str | None:
    """Rows of quantized tables, and the sums of them."""
    first = _lookup(match.root)
    if first is None:
        return "its table is float"
    lookups, rounded, value = [first], list[fx.Node](), match.root
    while True:
        trip = round_trip(value)
        sum_ = added_rows(trip[1] if trip else value)
        if sum_ is None:
            break
        total, other = sum_
        lookup = _lookup(other)
        even = not trip if len(lookups) == 1 else len(lookups) == 2 or bool(trip) == bool(rounded)
        if lookup is None or len(other.users) > 1 or not even:
            break
        if trip:
            rounded.append(trip[0])
            match.take(*trip)
        lookups.append(lookup)
        match.at = total
        match.take(other, total)
        value = total
    _tables(match, lookups, rounded)
    return ""


def added_rows(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum that alone reads ``value``, and its other term, which may be shared by the whole batch."""
    addition = added(value)
    if addition is not None:
        return addition
    user = next(iter(value.users)) if len(value.users) == 1 else None
    if user is None or user.target not in ADD or user.kwargs or user.meta.get("type") != value.meta["type"]:
        return None
    others = [other for other in value_operands(user) if other is not value]
    return (user, others[0]) if len(others) == 1 and is_float(others[0]) else None


def _lookup(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The ``dequantize`` of the table and the ids of an embedding in codes."""
    if node.target not in EMBEDDING:
        return None
    lookup = EmbeddingNode(node)
    table = stored_codes(lookup.table)
    return (table, lookup.ids) if table is not None else None


def _tables(match: Match, lookups: list[tuple[fx.Node, fx.Node]], rounded: list[fx.Node]) -> None:
    match.arguments |= {"ids": [ids for _, ids in lookups], "tables": [operand(table, "code") for table, _ in lookups]}
    for name in ("scale", "zero_point"):
        match.arguments[f"table_{name}s"] = [operand(table, name) for table, _ in lookups]
        match.arguments[f"rounded_{name}s"] = [operand(node, name) for node in rounded]
    match.quantizers |= {f"table_{i}": table.meta["quantizer"] for i, (table, _) in enumerate(lookups)}
    match.quantizers |= {f"rounded_{i}": node.meta["quantizer"] for i, node in enumerate(rounded)}
    match.fused_nodes += [table for table, _ in lookups]
    if rounded:
        match.arguments["rounded_grid"] = str(rounded[0].meta["quantizer"].spec.grid)


FUSIONS = (
    Fusion(
        "linear",
        frozenset({aten.linear.default}),
        kernels.fused_linear,
        start_linear,
        (take_activation, take_residual, take_quantize),
        first=("x", "weight", "weight_scale", "weight_zero_point", "bias"),
    ),
    Fusion(
        "attention",
        ATTENTIONS,
        kernels.fused_attention,
        start_attention,
        (take_heads, take_quantize),
        first=("query", "key", "value", "mask"),
    ),
    Fusion(
        "rotary",
        MULTIPLY,
        kernels.fused_rotary,
        start_rotary,
        (take_any_quantize,),
        first=("x", "cos", "sin"),
    ),
    Fusion("norm", NORM, kernels.fused_norm, start_norm, (take_any_quantize,), first=("x", "weight", "bias")),
    Fusion(
        "activation",
        frozenset(row.target for row in ACTIVATIONS if row.name),
        kernels.fused_pointwise,
        start_activation,
        (take_factor, take_any_quantize),
        first=("x",),
    ),
    Fusion(
        "heads",
        frozenset({aten.transpose.int}),
        kernels.fused_pointwise,
        start_joining,
        (take_any_quantize,),
        first=("x",),
    ),
    Fusion("sum", ADD, kernels.fused_pointwise, start_sum, (take_any_quantize,), first=("x",)),
    Fusion(
        "embedding",
        EMBEDDING,
        kernels.fused_embedding,
        start_embedding,
        (take_any_quantize,),
        first=("ids", "tables"),
    ),
)
"""In the order in which they are tried at a node; each operator is the root of one of them."""
