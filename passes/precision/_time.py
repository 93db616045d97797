"""The time of a program's linears as a limit of the assignment: weights and activations decide it together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from bitlower.ir import Program
from bitlower.ir.dataflow import LINEAR, QUANTIZER, linears, value_uses
from bitlower.ir.operators import LinearNode
from bitlower.passes.precision._items import Item, is_weight
from bitlower.passes.precision._knapsack import Limit, Pair
from bitlower.passes.precision._report import TIME
from bitlower.passes.precision._roofline import Linear, Roofline


@dataclass(frozen=True)
class Product:
    """A linear, and the quantizers of its weight and of its input; None where there is none."""

    linear: Linear
    weight: fx.Node | None
    activation: fx.Node | None


@dataclass(frozen=True)
class Time:
    """What linears take, in picoseconds.

    Args:
        limit: what the items decide; its bound is what they may spend at most.
        fixed: what no item decides.
        before: of all linears, with the bits that they have.
    """

    limit: Limit
    fixed: int
    before: int


def products(program: Program) -> list[Product]:
    """The linears of a simulated program, in graph order."""
    rounded: dict[fx.Node, fx.Node] = {}
    for node, _ in program.quantizers():
        if not is_weight(node):
            rounded |= {reader: node for value, reader in value_uses(node) if _reads(reader, value)}
    linear_products = []
    for node in linears(program.graph):
        inputs = int(LinearNode(node).x.meta["type"].shape[-1])
        weight = LinearNode(node).weight
        shape = tuple(int(size) for size in weight.meta["type"].shape)
        outputs = math.prod(shape) // inputs
        if weight.target not in QUANTIZER:
            linear_products.append(Product(Linear(inputs, outputs), None, rounded.get(node)))
            continue
        spec = weight.meta["quantizer"].spec
        linear = Linear(inputs, outputs, math.prod(spec.granularity.scale_shape(shape)), spec.grid.symmetric)
        linear_products.append(Product(linear, weight, rounded.get(node)))
    return linear_products


def _reads(node: fx.Node, value: fx.Node) -> bool:
    return node.target in LINEAR and LinearNode(node).x is value


def time_of(program: Program, items: Sequence[Item], target: Roofline, rows: int, share: float) -> Time:
    """The time on ``rows`` rows, at most ``share`` of what the linears take with the bits that they have."""
    owner = {node: index for index, item in enumerate(items) for node in item.nodes}
    alone = [[0] * len(item.widths) for item in items]
    joint: dict[tuple[int, int], np.ndarray[tuple[int, int], np.dtype[np.int64]]] = {}
    fixed = before = 0
    for part in products(program):
        sides = [owner.get(node) if node is not None else None for node in (part.weight, part.activation)]
        weights, activations = (
            items[side].widths if side is not None else (_bits(node),)
            for side, node in zip(sides, (part.weight, part.activation), strict=True)
        )
        table = np.array([[target.picoseconds(part.linear, rows, w, a) for a in activations] for w in weights])
        before += target.picoseconds(part.linear, rows, _bits(part.weight), _bits(part.activation))
        match sides:
            case [None, None]:
                fixed += int(table[0, 0])
            case [int(weight), int(activation)]:
                joint[weight, activation] = joint.get((weight, activation), 0) + table
            case [weight, activation]:
                side = weight if weight is not None else activation
                assert side is not None
                alone[side] = [have + int(more) for have, more in zip(alone[side], table.flat, strict=True)]
    pairs = tuple(Pair(*key, tuple(map(tuple, table.tolist()))) for key, table in joint.items())
    most = math.floor(share * before * (1 + 1e-9)) - fixed
    return Time(Limit(TIME, tuple(map(tuple, alone)), most, pairs), fixed, before)


def _bits(node: fx.Node | None) -> int | None:
    """The bits of a quantizer as it stands."""
    return int(node.meta["quantizer"].spec.grid.bits) if node is not None else None
