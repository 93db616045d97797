"""What fusion gave: the kernels, what remains outside them and why, and the launches of each block before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bitlower.ir import kernels, ops
from bitlower.ir.blocks import Block, blocks
from bitlower.ir.dataflow import PARTS, VIEWS, constants
from bitlower.ir.rewrite import Miss
from bitlower.passes._machinery.report import Record
from bitlower.passes.lowering._fusion import Fused

aten = torch.ops.aten
_COPIES = frozenset({aten.contiguous.default, aten.clone.default, aten.index_select.default})
_QUANTIZERS = frozenset({ops.quantize, ops.dequantize, ops.choose_qparams})


@dataclass(frozen=True)
class KernelRow:
    """A kernel.

    Args:
        kernel: the operator, such as ``fused_linear``.
        node: its name in the graph.
        path: the module path of the operator that it started at.
        block: the number of the block; -1 outside of all.
        outputs: what it returns.
        operators: what it does the work of.
    """

    kernel: str
    node: str
    path: str
    block: int
    outputs: str
    operators: tuple[str, ...]


@dataclass(frozen=True)
class RemainingRow:
    """A ``quantize``, ``dequantize`` or ``choose_qparams`` outside of kernels.

    Args:
        node: its name.
        operator: which it is.
        tensor: what it rounds.
        path: its module path.
        block: the number of the block; -1 outside of all.
        reason: why no kernel took it.
    """

    node: str
    operator: str
    tensor: str
    path: str
    block: int
    reason: str


@dataclass(frozen=True)
class FusedBlockRow:
    """A repeated block of the model.

    Args:
        block: its number.
        before: operators that compute, each a launch: no views, no sizes; the dequantization of weights counts.
        after: kernels, and operators that remain beside them.
        remaining: quantize, dequantize and choose_qparams that remain.
    """

    block: int
    before: int
    after: int
    remaining: int


@dataclass(frozen=True)
class FuseReport(Record):
    """What became of a program."""

    kernels: tuple[KernelRow, ...]
    remaining: tuple[RemainingRow, ...]
    misses: tuple[Miss, ...]
    blocks: tuple[FusedBlockRow, ...]

    def summary(self) -> str:
        """One line for people."""
        text = f"{len(self.kernels)} kernels"
        if self.blocks:
            before, after = (max(getattr(row, name) for row in self.blocks) for name in ("before", "after"))
            inside = sum(row.remaining for row in self.blocks)
            text += f"; launches a block {before} → {after}; quantize and dequantize left inside blocks: {inside}"
        outside = sum(row.block < 0 for row in self.remaining)
        return f"{text}, outside: {outside}" if self.blocks else f"{text}; quantize and dequantize left: {outside}"


class Launches:
    """The blocks of an integer graph, and how many launches each takes."""

    def __init__(self, module: fx.GraphModule) -> None:
        repeated_blocks = blocks(module)
        self.place = {node: index for index, block in enumerate(repeated_blocks) for node in _computed_from(block)}
        constant = constants(module.graph)
        self.count = [0] * len(repeated_blocks)
        weights: set[tuple[int, fx.Node]] = set()
        for node, index in self.place.items():
            self.count[index] += computes(node)
            weights |= {(index, n) for n in node.all_input_nodes if n in constant and n.target in _QUANTIZERS}
        for index, _ in weights:
            self.count[index] += 1


def _computed_from(block: Block) -> list[fx.Node]:
    """The nodes of a block that depend on what enters it; masks and positions do not."""
    reached, dependents = {block.source}, []
    for node in block.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            dependents.append(node)
    return dependents


def computes(node: fx.Node) -> bool:
    """Whether a runtime that fuses nothing launches a kernel for ``node``: it is no view, no size and no part."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _COPIES:
        return True
    return node.target not in VIEWS | PARTS and node.target is not aten.sym_size.int


def report(
    module: fx.GraphModule, before: Launches, fused_kernels: Sequence[Fused], misses: Sequence[Miss]
) -> FuseReport:
    """What became of one graph."""
    place = {node: index for node, index in before.place.items()}
    place |= {fused.node: before.place.get(fused.root, -1) for fused in fused_kernels}
    alive = list(module.graph.nodes)
    rows = [_row(fused, place) for fused in fused_kernels if fused.node.users]
    said = {miss.node: miss.reason for miss in misses}
    said |= {fused.node.name: said[fused.root_name] for fused in fused_kernels if fused.root_name in said}
    remaining = [_remaining(node, place, said) for node in alive if node.target in _QUANTIZERS]
    after = [0] * len(before.count)
    for node in alive:
        if place.get(node, -1) >= 0 and computes(node):
            after[place[node]] += 1
    left = [sum(row.block == index for row in remaining) for index in range(len(after))]
    counts = zip(before.count, after, left, strict=True)
    return FuseReport(
        tuple(rows),
        tuple(remaining),
        tuple(misses),
        tuple(FusedBlockRow(index, *count) for index, count in enumerate(counts)),
    )


def joined(parts: Sequence[FuseReport]) -> FuseReport:
    """The reports of several graphs as one."""
    names = [field.name for field in dataclasses.fields(FuseReport)]
    return FuseReport(*(tuple(row for part in parts for row in getattr(part, name)) for name in names))


def _row(fused: Fused, place: dict[fx.Node, int]) -> KernelRow:
    node = fused.node
    name = str(node.target).removeprefix("bitlower.").removesuffix(".default")
    outputs = str(kernels.arguments(node)["outputs"])
    return KernelRow(name, node.name, str(node.meta.get("path", "")), place[node], outputs, fused.operators)


def _remaining(node: fx.Node, place: dict[fx.Node, int], said: dict[str, str]) -> RemainingRow:
    quantizer = node.meta.get("quantizer")
    tensor = quantizer.tensor if quantizer else node.all_input_nodes[0].name
    name = str(node.target).removeprefix("bitlower.").removesuffix(".default")
    path = str(node.meta.get("path", ""))
    return RemainingRow(node.name, name, tensor, path, place.get(node, -1), _reason(node, said))


def _reason(node: fx.Node, said: dict[str, str]) -> str:
    """Why no kernel took ``node``: what makes the value that it rounds, or what reads the value that it makes."""
    around = list(node.users) if node.target is ops.dequantize else node.all_input_nodes[:1]
    texts = []
    for other in around:
        kernel_output = kernels.output_of(other)
        source = kernel_output[0] if kernel_output else other
        known = said.get(source.name)
        what = str(source.target).removesuffix(".default") if source.op == "call_function" else f"the {source.op}"
        verb = "read by" if node.target is ops.dequantize else "given by"
        texts.append(f"{verb} {what} (%{source.name})" + (f": {known}" if known else ", which is no kernel"))
    return "; ".join(dict.fromkeys(texts))
