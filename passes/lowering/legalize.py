"""Make grouped activations per-tensor ones: linears become sums over slices that have one scale each."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import fx

from bitlower.ir import BitlowerError, Granularity, Level, Program, Quantizer, TensorType, ops, set_tensor
from bitlower.ir.dataflow import VIEWS, linears
from bitlower.ir.operators import LinearNode
from bitlower.ir.quantization.scheme import ACTIVATION_ROLES
from bitlower.ir.quantizer_node import QuantizerNode, is_uncalibrated
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.report import Record, counted, few
from bitlower.passes.lowering._groups import ScaleGroup, merge_groups, stored_groups

aten = torch.ops.aten
_ELEMENTWISE = 8
"""Operations of a runtime that rounds with one scale an index: divide, round, shift, clip, to codes; and three back."""
_BITS = 8
"""What integer kernels of runtimes multiply."""


@dataclass(frozen=True)
class LegalizeRow:
    """What became of a quantizer with embedding groups.

    Args:
        tensor: what it quantizes.
        role: its role.
        path: its module path.
        groups: how many groups of equal scale it had.
        parts: how many slices with a scale of their own it has now; 0 where it was left alone.
        linears: how many linears were cut into as many.
        reason: why it, or a linear that reads it, was left alone; empty if nothing was.
    """

    tensor: str
    role: str
    path: str
    groups: int
    parts: int
    linears: int
    reason: str


@dataclass(frozen=True)
class LegalizeReport(Record):
    """Every quantizer with embedding groups, in execution order."""

    rows: tuple[LegalizeRow, ...]

    def summary(self) -> str:
        """How many quantizers and linears were cut."""
        cut = [row for row in self.rows if row.parts]
        slices, linears = sum(row.parts for row in cut), sum(row.linears for row in cut)
        return (
            f"{len(cut):,} of {counted(len(self.rows), 'grouped quantizer')} cut into {counted(slices, 'slice')} with "
            f"one scale each, {counted(linears, 'linear')} into a linear for each slice"
        )

    def details(self) -> Iterable[str]:
        """What was left alone, and why."""
        return few(f"{row.tensor}: {row.reason}" for row in self.rows if row.reason)


@dataclass(frozen=True)
class Legalize(Pass):
    """Cut linears whose input is quantized in embedding groups into linears on per-tensor slices, and sum them.

    ``x̂ Wᵀ = Σ_k s_k (q_k − z_k) W[:, k]ᵀ`` (Bondarenko et al. §4, for hardware that has one scale a tensor): equal but
    for the order of float sums. Weights stay stored once; each linear reads a slice. What else reads the value gets the
    slices put together again; values that no linear reads are cut only where that takes fewer operations.
    """

    name: ClassVar[str] = "legalize"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.EXACT
    merge: Annotated[float, Ge(1)] = 1.0
    """Neighbouring groups are merged where no index gets a step more than this many times its own; above 1 the pass is
    lossy."""
    limit: Annotated[int, Ge(1)] = 16
    """The most slices that a value is cut into; with more groups it stays as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge > 1:
            object.__setattr__(self, "contract", Contract.LOSSY)

    def unforeseen(self, program: Program) -> Iterable[str]:
        """How many slices are made depends on data."""
        rounded = {n: q.spec.granularity for n, q in program.quantizers() if q.role in ACTIVATION_ROLES}
        cut = [_most_slices(rounded.get(LinearNode(node).x)) for node in linears(program.graph)]
        if sum(cut) > len(cut):
            yield (
                f"it makes up to {sum(cut):,} products of {len(cut):,}, each a node to trace, to write and to check;"
                " memory and time are as without it"
            )

    def run(self, program: Program, context: Context) -> bool:
        """Rewrite all grouped quantizers and leave a :class:`LegalizeReport`.

        Raises:
            BitlowerError: a quantizer has no range yet.
        """
        rows = tuple(_legalize(program, node, self) for node in grouped(program.module))
        context.put(LegalizeReport(rows))
        return any(row.parts for row in rows)


def grouped(module: fx.GraphModule) -> list[fx.Node]:
    """The static activation quantizers with several scales along their last axis.

    Raises:
        BitlowerError: one of them, or the weight of a linear that reads it, has no range yet.
    """
    quantizers = []
    for node in module.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        granularity = node.meta["quantizer"].spec.granularity
        if QuantizerNode(node).rounds_parameter or not granularity.kind.startswith("embedding"):
            continue
        readers = [LinearNode(user) for user in node.users if user.target is aten.linear.default]
        for quantizer in (node, *(reader.weight for reader in readers)):
            if is_uncalibrated(quantizer):
                tensor = quantizer.meta["quantizer"].tensor
                raise BitlowerError(f"the quantizer of {tensor} has no range", hint="run `calibrate` before `legalize`")
        quantizers.append(node)
    return quantizers


def _legalize(program: Program, node: fx.Node, options: Legalize) -> LegalizeRow:
    """Rewrite one quantizer as far as it pays."""
    groups = stored_groups(program.module, node)
    quantizer: Quantizer = node.meta["quantizer"]
    merged = merge_groups(groups, quantizer.spec.grid, options.merge)
    readers = [(user, _refusal(user)) for user in node.users if user.target is aten.linear.default]
    linears = [user for user, reason in readers if not reason]
    others = [user for user in node.users if user not in linears]
    reasons = sorted({reason for _, reason in readers if reason})
    if any(reader.target is aten.linear.default for view in _views(node) for reader in view.users):
        reasons.append("a linear reads a view of it, whose product stays float")
    objection = _why_kept(len(merged), linears, others, options.limit)
    cut = 0
    if not objection:
        parts = _quantize_parts(program, node, merged)
        if len(parts) > 1:
            cut = len(linears)
            for linear in linears:
                _cut_linear(linear, parts, merged)
        if node.users:
            node.replace_all_uses_with(_joined(node, parts))
        node.graph.erase_node(node)
    path, count = str(node.meta.get("path", "")), 0 if objection else len(merged)
    reason = "; ".join([*reasons, objection] if objection else reasons)
    return LegalizeRow(quantizer.tensor, quantizer.role, path, len(groups), count, cut, reason)


def _why_kept(parts: int, linears: Sequence[fx.Node], others: Sequence[fx.Node], limit: int) -> str:
    """Why a value is not cut into ``parts``; empty if it is."""
    if parts == 1:
        return ""
    if parts > limit:
        return f"{parts} groups are more than {limit}"
    if not linears and 2 * parts + 2 > _ELEMENTWISE:
        return f"{parts} slices and their quantizers take more operations than one scale an index"
    return ""


def _views(node: fx.Node) -> list[fx.Node]:
    """The views of ``node``, and those of them."""
    views = [user for user in node.users if user.target in VIEWS]
    return views + [further for view in views for further in _views(view)]


def _refusal(linear: fx.Node) -> str:
    """Why an integer kernel could not compute slices of ``linear``; empty if it could."""
    weight = LinearNode(linear).weight
    if "quantizer" not in weight.meta:
        return "the weight is float"
    spec = weight.meta["quantizer"].spec
    across = spec.granularity.kind in ("tensor", "row-group") or (
        spec.granularity.kind == "channel" and spec.granularity.axis % 2 == 0
    )
    if not across:
        return "the weight has scales along its input axis"
    wide = max(spec.grid.bits, LinearNode(linear).x.meta["quantizer"].spec.grid.bits)
    return f"{wide} bits have no integer kernel" if wide > _BITS else ""


def _quantize_parts(program: Program, node: fx.Node, groups: Sequence[ScaleGroup]) -> list[fx.Node]:
    """The quantized slices of what ``node`` rounds, each with its own scale; the whole value where there is one."""
    value, quantizer = QuantizerNode(node).value, node.meta["quantizer"]
    grid = quantizer.spec.grid
    spec = replace(quantizer.spec, granularity=Granularity.per_tensor())
    sizes = [group.stop - group.start for group in groups]
    slices = []
    with node.graph.inserting_before(node):
        whole = node.graph.call_function(aten.split_with_sizes.default, (value, sizes, -1)) if len(sizes) > 1 else value
        if whole is not value:
            whole.meta = _place(node)
        for index, group in enumerate(groups):
            part = value
            if whole is not value:
                name = f"{value.name}_part_{index}"
                part = node.graph.create_node("call_function", operator.getitem, (whole, index), name=name)
                part.meta = _place(node) | {"type": _narrowed(value, sizes[index])}
            args = (part, *_stored(program, node, part.name, group), grid.quant_min, grid.quant_max)
            rounded = node.graph.create_node("call_function", ops.fake_quantize, args, name=f"{part.name}_quantized")
            rounded.meta = dict(node.meta) | {
                "type": part.meta["type"],
                "quantizer": Quantizer(quantizer.role, spec, part.name),
            }
            slices.append(rounded)
    return slices


def _stored(program: Program, node: fx.Node, stem: str, group: ScaleGroup) -> tuple[fx.Node, fx.Node]:
    """Scale and zero point of ``group`` as tensors of the program."""
    nodes = []
    for name, value in (("scale", group.scale), ("zero_point", group.zero_point)):
        target = f"quantizers.{stem}.{name}"
        set_tensor(program.module, target, value.clone())
        attribute = node.graph.create_node("get_attr", target, name=f"{stem}_{name}")
        attribute.meta = {"type": TensorType(torch.float32, ())}
        nodes.append(attribute)
    return nodes[0], nodes[1]


def _cut_linear(linear: fx.Node, parts: Sequence[fx.Node], groups: Sequence[ScaleGroup]) -> None:
    """Let ``linear`` become the last addition of the products of the slices; the bias goes with the first."""
    weight, bias = LinearNode(linear).weight, LinearNode(linear).bias
    kind: dict[str, object] = _place(linear) | {"type": linear.meta["type"]}
    total: fx.Node | None = None
    with linear.graph.inserting_before(linear):
        for part, group in zip(parts, groups, strict=True):
            columns = linear.graph.call_function(aten.slice.Tensor, (weight, 1, group.start, group.stop))
            columns.meta = _place(linear) | {"type": _narrowed(weight, group.stop - group.start)}
            arguments = (part, columns) if total is not None or bias is None else (part, columns, bias)
            product = linear.graph.call_function(aten.linear.default, arguments)
            product.meta = dict(kind)
            if total is None:
                total = product
            elif part is parts[-1]:
                linear.target, linear.args = aten.add.Tensor, (total, product)
            else:
                total = linear.graph.call_function(aten.add.Tensor, (total, product))
                total.meta = dict(kind)


def _joined(node: fx.Node, parts: Sequence[fx.Node]) -> fx.Node:
    """The quantized slices as one value again."""
    if len(parts) == 1:
        return parts[0]
    with node.graph.inserting_before(node):
        whole = node.graph.call_function(aten.cat.default, (list(parts), -1))
    whole.meta = _place(node) | {"type": node.meta["type"]}
    return whole


def _narrowed(node: fx.Node, size: int) -> TensorType:
    """The type of ``size`` indices of the last axis."""
    kind: TensorType = node.meta["type"]
    return TensorType(kind.dtype, (*kind.shape[:-1], size))


def _place(node: fx.Node) -> dict[str, object]:
    return {key: node.meta[key] for key in ("path", "source") if key in node.meta}


def _most_slices(granularity: Granularity | None) -> int:
    return granularity.num_groups if granularity and granularity.kind in ("embedding-group", "embedding-parts") else 1
