"""Quantizers by role, by layer of the model, and by both; layers are found from the flow of values, not from names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from bitlower.ir import BitlowerError, Program
from bitlower.ir.blocks import blocks
from bitlower.ir.dataflow import LINEAR, QUANTIZER, value_uses
from bitlower.passes._machinery.patterns import Patterns

By = Literal["role", "layer", "both"]
BEFORE, BETWEEN, AFTER = "(before the layers)", "(between encoder and decoder)", "(after the layers)"
OUTSIDE = (BEFORE, BETWEEN, AFTER)
"""What stands for the layer of what lies in none."""


@dataclass(frozen=True)
class QuantizerGroup:
    """Quantizers that belong together.

    Args:
        by: what they have in common.
        role: their role; empty if they are grouped by layer alone.
        layer: the module path of their layer, or one of :data:`OUTSIDE`; empty if grouped by role alone.
        nodes: the quantizers, in graph order.
    """

    by: By
    role: str
    layer: str
    nodes: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """Role and layer in words."""
        return f"{self.role} of {self.layer}" if self.role and self.layer else self.role or self.layer


def group_quantizers(program: Program, by: Sequence[By]) -> list[QuantizerGroup]:
    """The quantizers in groups of each kind that ``by`` names; groups stand in the order of their first quantizer.

    Raises:
        BitlowerError: there are no quantizers.
    """
    layers = layers_of_quantizers(program)
    if not layers:
        raise BitlowerError("the program has no quantizers", hint="run `quantize` and `calibrate` first")
    groups: dict[tuple[By, str, str], list[fx.Node]] = {}
    for kind in by:
        for node, layer in layers.items():
            role = node.meta["quantizer"].role if kind != "layer" else ""
            groups.setdefault((kind, role, layer if kind != "role" else ""), []).append(node)
    return [QuantizerGroup(kind, role, layer, tuple(nodes)) for (kind, role, layer), nodes in groups.items()]


def layers_of_quantizers(program: Program) -> dict[fx.Node, str]:
    """The layer of each quantizer, in graph order; a weight belongs to the layer of its first reader."""
    names = dict[fx.Node, str]()
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    for index, block in enumerate(blocks(program.module)):
        name = _common_path(n for n in block.nodes if n.target in LINEAR) or f"layer {index}"
        names |= dict.fromkeys(block.nodes, name)
    places = [position[node] for node in names]
    first, last = min(places, default=0), max(places, default=-1)

    def layer(node: fx.Node) -> str:
        reader = min((user for _, user in value_uses(node)), key=position.__getitem__, default=node)
        where = reader if node.all_input_nodes[0].op == "get_attr" else node
        return names.get(where) or (AFTER if position[where] > last else BEFORE if position[where] < first else BETWEEN)

    return {node: layer(node) for node, _ in program.quantizers()}


def _common_path(nodes: Iterable[fx.Node]) -> str:
    """The longest module path that all ``nodes`` lie below."""
    paths = [str(node.meta.get("path", "")).split(".") for node in nodes]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def exclusion(program: Program, group: QuantizerGroup) -> tuple[str, ...]:
    """Patterns for ``ignore`` that leave the quantizers of a layer float and no others; empty where none do."""
    own = set(group.nodes)
    for patterns in ((group.layer,), tuple(sorted({path for node in own for path in site_paths(node)}))):
        if not all(patterns):
            continue
        try:
            matcher = Patterns(patterns)
        except BitlowerError:
            continue
        hit = {
            node for node, _ in program.quantizers() if all(matcher.match(p, f"{p}.weight") for p in site_paths(node))
        }
        if hit == own:
            return patterns
    return ()


def site_paths(node: fx.Node) -> tuple[str, ...]:
    """The module paths by which patterns know a quantizer: those of what reads a weight or a linear's input."""
    quantizer, value = node.meta["quantizer"], node.all_input_nodes[0]
    if value.op == "get_attr" or quantizer.role in ("linear-input", "convolution-input"):
        readers = [user for _, user in value_uses(node) if user.target not in QUANTIZER]
        return tuple(str(reader.meta.get("path", "")) for reader in readers)
    return (str(value.meta.get("path", "")),)
