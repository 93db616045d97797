"""What ``assign-precision`` chooses for: quantizers that keep together, the bits that each may have, their grids."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from bitlower.ir import Batch, Program, Quantizer, QuantSpec
from bitlower.ir.dataflow import fusion_groups
from bitlower.ir.operators import LinearNode, operand, set_argument
from bitlower.ir.quantization.scheme import WEIGHT_ROLES
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.passes._machinery.base import Context
from bitlower.passes.precision._trials import Rounding
from bitlower.passes.quantizers.calibrate import Calibrate

SCALE_BYTES = 4
"""Scales are float32."""


@dataclass(frozen=True)
class Item:
    """Quantizers that get the same bits.

    Args:
        nodes: they themselves.
        widths: the bits to choose from, ascending.
    """

    nodes: tuple[fx.Node, ...]
    widths: tuple[int, ...]

    @property
    def is_weight(self) -> bool:
        """Whether these round parameters."""
        return is_weight(self.nodes[0])

    @property
    def tensors(self) -> tuple[str, ...]:
        """What they round."""
        return tuple(node.meta["quantizer"].tensor for node in self.nodes)

    @property
    def before(self) -> int:
        """The bits that they have; the most of them."""
        return max(int(node.meta["quantizer"].spec.grid.bits) for node in self.nodes)

    @property
    def role(self) -> str:
        """Their role."""
        return str(self.nodes[0].meta["quantizer"].role)

    def bits_cost(self, width: int) -> int:
        """Bits of all codes of weights; of activations the bits of each quantizer."""
        return width * (sum(map(elements, self.nodes)) if self.is_weight else len(self.nodes))

    def bytes_cost(self, width: int) -> int:
        """Bytes of weights: :func:`stored_bytes`; 0 of activations, which are not stored."""
        return sum(stored_bytes(node, width) for node in self.nodes) if self.is_weight else 0


def is_weight(node: fx.Node) -> bool:
    """Whether the quantizer ``node`` rounds a parameter."""
    return node.meta["quantizer"].role in WEIGHT_ROLES


def elements(node: fx.Node) -> int:
    """The number of weights that the quantizer ``node`` rounds."""
    return math.prod(int(size) for size in node.meta["type"].shape)


def stored_bytes(node: fx.Node, width: int) -> int:
    """Codes packed densely, float32 scales, and zero points in the bits of codes where the grid has some."""
    spec: QuantSpec = node.meta["quantizer"].spec
    scales = math.prod(spec.granularity.scale_shape(node.meta["type"].shape))
    zeros = 0 if spec.grid.symmetric else math.ceil(width * scales / 8)
    return math.ceil(width * elements(node) / 8) + SCALE_BYTES * scales + zeros


def float_bytes(program: Program) -> int:
    """Bytes of the parameters that no quantizer rounds."""
    rounded = {QuantizerNode(node).parameter for node, _ in program.quantizers() if is_weight(node)}
    total = 0
    for name, tensor in program.tensors():
        target = name.partition("/")[2]
        if isinstance(tensor, torch.nn.Parameter) and target not in rounded:
            total += tensor.numel() * tensor.element_size()
    return total


def find_items(program: Program, weights: Sequence[int], activations: Sequence[int], keep: bool) -> list[Item]:
    """The quantizers to choose for, in graph order.

    Weights of linears that read the same activation (query, key, value; gate, up) are one item, and so are their
    outputs.

    Args:
        program: at level simulated.
        weights: the widths of weights; none: they are no items.
        activations: the same.
        keep: an activation may also keep the bits that it has.
    """
    group: dict[fx.Node, tuple[fx.Node, bool]] = {}
    for linears in fusion_groups(program.graph):
        for linear in linears:
            group[LinearNode(linear).weight] = (linears[0], True)
            group |= {user: (linears[0], False) for user in linear.users if "quantizer" in user.meta}
    together: dict[object, list[fx.Node]] = {}
    for node, _ in program.quantizers():
        together.setdefault(group.get(node, node), []).append(node)
    items = []
    for nodes in together.values():
        widths = set(weights if is_weight(nodes[0]) else activations)
        item = Item(tuple(nodes), tuple(sorted(widths)))
        if widths and keep and not item.is_weight:
            item = replace(item, widths=tuple(sorted({*widths, item.before})))
        if widths:
            items.append(item)
    return items


def set_width(node: fx.Node, width: int) -> None:
    """Give the uncalibrated or dynamic quantizer ``node`` another number of bits."""
    quantizer: Quantizer = node.meta["quantizer"]
    grid = replace(quantizer.spec.grid, bits=width)
    node.meta["quantizer"] = replace(quantizer, spec=replace(quantizer.spec, grid=grid))
    set_argument(node, "quant_min", grid.quant_min)
    set_argument(node, "quant_max", grid.quant_max)
    if quantizer.spec.granularity.dynamic:
        set_argument(operand(QuantizerNode(node).scale, "source"), "bits", width)


def roundings(
    program: Program, nodes: Collection[fx.Node], width: int | None, calibrate: Calibrate, batches: Sequence[Batch]
) -> dict[fx.Node, Rounding]:
    """``nodes`` of a program with uncalibrated quantizers, calibrated at ``width`` bits (None: those that they have).

    Ranges of activations are those of the float model: neither weights nor other activations are rounded before them.
    """
    parts = [[node for node in nodes if is_weight(node) is kind] for kind in (True, False)]
    node_roundings: dict[fx.Node, Rounding] = {}
    for part in filter(None, parts):
        node_roundings |= _calibrated(program, {node.name: node for node in part}, width, calibrate, batches)
    return node_roundings


def _calibrated(
    program: Program, wanted: dict[str, fx.Node], width: int | None, calibrate: Calibrate, batches: Sequence[Batch]
) -> dict[fx.Node, Rounding]:
    """The quantizers ``wanted``, by name, calibrated in a copy of the program that has no others."""
    copy = program.clone()
    for node in list(copy.graph.nodes):
        if "quantizer" in node.meta and node.name not in wanted:
            node.replace_all_uses_with(QuantizerNode(node).value)
            copy.graph.erase_node(node)
        elif node.name in wanted and width is not None:
            set_width(node, width)
    copy.recompile()
    calibrate.run(copy, Context(calibration=batches))
    return {wanted[node.name]: Rounding.of(copy, node) for node, _ in copy.quantizers()}


def calibrate_with(program: Program, node: fx.Node, rounding: Rounding) -> None:
    """Give the uncalibrated quantizer ``node``, of the bits of ``rounding``, its scale and zero point."""
    if rounding.scale is not None and rounding.zero_point is not None:
        QuantizerNode(node).set_range(program.module, rounding.scale, rounding.zero_point)
