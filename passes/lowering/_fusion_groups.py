"""Put the slices that ``legalize`` cut back together: one value in embedding groups, and one linear that sums them.

Runtimes without groups want a linear for each; a kernel sums over groups by itself, in the same order.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from bitlower.ir import Granularity, Quantizer, TensorType, ops, set_tensor
from bitlower.ir.dataflow import ADD
from bitlower.ir.operators import BinaryNode, LinearNode, argument, operand, set_argument
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.rewrite import Miss, call_again, call_like, sole_user
from bitlower.passes.lowering._fusion import erase_dead, round_trip

aten = torch.ops.aten
COLUMNS = "columns"
"""In the meta of a linear while it is fused: the sizes of the slices of its input whose products are summed in turn."""


def regroup(module: fx.GraphModule) -> tuple[dict[fx.Node, fx.Node], list[Miss]]:
    """Undo the slicing wherever it is whole; each new linear with the node it stands in for, and what stayed."""
    stands_for: dict[fx.Node, fx.Node] = {}
    misses: list[Miss] = []
    for split in module.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default):
        trips = _parts(split)
        if trips is None:
            continue
        sums = [ends for user in trips[0][1].users if (ends := _sum(user, trips)) is not None]
        whole = {last for _, last in sums} | {user for user in trips[0][1].users if _is_whole(user, trips)}
        if len(whole) != len(trips[0][1].users):
            reason = "something reads a slice alone"
            misses.append(Miss("groups", split.name, str(split.meta.get("path", "")), reason))
            continue
        value = _joined(module, split, trips)
        for first, last in sums:
            stands_for[_linear(first, last, value, split)] = last
        dead = list(whole)
        for node in whole:
            if node.target is aten.cat.default:
                node.replace_all_uses_with(value)
        erase_dead(dead)
    return stands_for, misses


def _parts(split: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """The ``quantize`` and ``dequantize`` of every slice of the last axis; None if they have no scale each."""
    sizes, last = argument(split, "split_sizes"), operand(split, "self").meta["type"].rank - 1
    trips_by_index = {
        argument(user, "index"): round_trip(user) for user in split.users if user.target is operator.getitem
    }
    if argument(split, "dim") not in (-1, last) or sorted(trips_by_index) != list(range(len(sizes))):
        return None
    trips = [trips_by_index[index] for index in range(len(sizes))]
    scalar_trips = [trip for trip in trips if trip is not None and QuantizerNode(trip[0]).scale.meta["type"].rank == 0]
    specs = {trip[0].meta["quantizer"].spec for trip in scalar_trips}
    return scalar_trips if len(scalar_trips) == len(sizes) and len(specs) == 1 else None


def _sum(first: fx.Node, trips: list[tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, fx.Node] | None:
    """The linear on the first slice and the last of the additions of those on the others, in order."""
    if not _reads_slice(first, trips[0][1]):
        return None
    weight, start, total = operand(LinearNode(first).weight, "self"), 0, first
    for _, value in trips:
        end = start + value.meta["type"].shape[-1]
        if total is not first or start:
            user = sole_user(total)
            if user is None or user.target not in ADD or user.kwargs or BinaryNode(user).left is not total:
                return None
            product = operand(user, "other")
            total = user
        else:
            product = first
        if not _reads_slice(product, value) or LinearNode(product).weight.args != (weight, 1, start, end):
            return None
        start = end
    return first, total


def _reads_slice(linear: fx.Node, value: fx.Node) -> bool:
    """Whether ``linear`` multiplies ``value`` with columns of a quantized weight."""
    if linear.target is not aten.linear.default or LinearNode(linear).x is not value:
        return False
    columns = LinearNode(linear).weight
    return columns.target is aten.slice.Tensor and operand(columns, "self").target is ops.dequantize


def _is_whole(user: fx.Node, trips: list[tuple[fx.Node, fx.Node]]) -> bool:
    """Whether ``user`` puts all slices together again."""
    return user.target is aten.cat.default and user.args == ([value for _, value in trips], -1)


def _joined(module: fx.GraphModule, split: fx.Node, trips: list[tuple[fx.Node, fx.Node]]) -> fx.Node:
    """The whole value, rounded in groups."""
    value, first = operand(split, "self"), trips[0][0]
    sizes = [part.meta["type"].shape[-1] for _, part in trips]
    equal = len(set(sizes)) == 1
    make = Granularity.per_embedding_group if equal else Granularity.per_embedding_parts
    quantizer: Quantizer = first.meta["quantizer"]
    quantizer = replace(quantizer, spec=replace(quantizer.spec, granularity=make(len(sizes))), tensor=value.name)
    kind: TensorType = value.meta["type"]
    with split.graph.inserting_before(split):
        scales = []
        ranges = zip(*(QuantizerNode(trip[0]).range(module) for trip in trips), strict=True)
        for name, parts in zip(("scale", "zero_point"), ranges, strict=True):
            spread = [part.expand(1 if equal else size) for part, size in zip(parts, sizes, strict=True)]
            stored = torch.cat(spread).reshape(*(1,) * (kind.rank - 1), -1)
            set_tensor(module, f"quantizers.{value.name}.{name}", stored)
            scales.append(split.graph.get_attr(f"quantizers.{value.name}.{name}"))
            scales[-1].meta["type"] = TensorType(stored.dtype, tuple(stored.shape))
        codes = call_again(first, value, kind.with_dtype(first.meta["type"].dtype))
        for name, node in zip(("scale", "zero_point"), scales, strict=True):
            set_argument(codes, name, node)
        values = call_like(first, ops.dequantize, (codes, *scales), kind)
    for node in (codes, values):
        node.meta["quantizer"] = quantizer
    return values


def _linear(first: fx.Node, last: fx.Node, value: fx.Node, split: fx.Node) -> fx.Node:
    """One linear in the place of the additions up to ``last``."""
    weight, bias = operand(LinearNode(first).weight, "self"), LinearNode(first).bias
    args = (value, weight) if bias is None else (value, weight, bias)
    with last.graph.inserting_before(last):
        linear = call_like(last, aten.linear.default, args, last.meta["type"])
    linear.meta[COLUMNS] = list(argument(split, "split_sizes"))
    last.replace_all_uses_with(linear)
    return linear
