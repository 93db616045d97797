"""Which values between kernels are float16, where activations are; all others stay float32.

A value is float16 where all that read it are kernels that take it so: the inputs of linears, queries, keys and values,
and what activation functions and rotary embeddings read. Sums stay float32 in every kernel, and so does the residual
stream, a few of whose entries grow large in many decoders: what is added to a residual, the sum, and what a norm reads
as such. Results of norms are float16 as residuals too. A cache that only attention reads is float16 as an input and as
an output; other inputs and outputs keep their types.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bitlower.backends.tvm_kernels.spec.base import FLOATS, HALF
from bitlower.backends.tvm_kernels.spec.target import TARGETS, Target
from bitlower.ir import Batch, BitlowerError, Program, ValueSpec, kernels, nearest
from bitlower.ir.observe import observe
from bitlower.ir.operators import AttentionNode, LinearNode, NormNode, argument, graph_results

aten = torch.ops.aten
AUTO = "auto"
ACTIVATIONS = (AUTO, *FLOATS)
LARGEST = float(torch.finfo(torch.float16).max)
VIEWS = frozenset(
    {
        aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
        aten.squeeze.dim, aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.clone.default,
        aten.alias.default, aten.dropout.default, aten.slice.Tensor, aten.select.int,
    }
)  # fmt: skip
"""Operators that give entries of their first argument as they are."""
PARTS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
"""The same, as a list."""
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
_ATTENTION = aten.scaled_dot_product_attention.default
_FLOATS = frozenset({aten.linear.default, _ATTENTION, *_NORMS})
_READ: dict[Any, tuple[str, ...]] = {
    kernels.fused_linear: ("x",),
    kernels.fused_pointwise: ("x", "factor"),
    kernels.fused_rotary: ("x",),
    kernels.fused_attention: ("query", "key", "value"),
    kernels.fused_norm: (),
}
"""The operands that kernels take as float16; of the others those that are no residuals."""


def activations_of(target: Target, activations: str = AUTO) -> str:
    """The dtype that ``activations`` stands for on a target: ``auto`` is float16 where the target has it, else float32.

    Raises:
        BitlowerError: there is no such dtype, or the target has no kernels for it.
    """
    if activations not in ACTIVATIONS:
        raise BitlowerError(f"unknown activations {activations!r}", hint=nearest(str(activations), ACTIVATIONS))
    if activations == AUTO:
        return HALF if target.half else "float32"
    if activations == HALF and not target.half:
        halves = ", ".join(name for name, other in TARGETS.items() if other.half)
        raise BitlowerError(
            f"activations of {HALF} are for the target {halves}; kernels for {target} have none",
            hint="leave out `activations`",
        )
    return activations


def half_values(program: Program) -> frozenset[fx.Node]:
    """The nodes of a fused program whose values are float16 where activations are.

    What else a traced program returns beside its outputs (names that start with ``%``) changes nothing.
    """
    shown = len([spec for spec in program.outputs if not spec.name.startswith("%")])
    halves = {node for node in program.graph.nodes if _may_be(node)}
    while gone := {node for node in halves if not _stays(node, halves, shown)}:
        halves -= gone
    return frozenset(halves)


def _may_be(node: fx.Node) -> bool:
    """Whether the value of ``node`` is made by what can give float16."""
    if node.op == "placeholder":
        return node.meta["type"].is_float and "past" in node.meta["type"].shape
    if node.op != "call_function":
        return False
    if node.target in VIEWS | PARTS | {aten.cat.default} | _FLOATS:
        return True
    origin = kernels.output_of(node)
    if origin is None:
        return node.target is operator.getitem and _source(node).target in PARTS
    kernel, output = origin
    arguments = kernels.arguments(kernel)
    return kernel.target in _READ and output.name == "value" and (_is_norm(node) or arguments.get("residual") is None)


def _stays(node: fx.Node, halves: set[fx.Node], shown: int) -> bool:
    """Whether ``node`` can be float16 if those of ``halves`` are."""
    if node.target in VIEWS | PARTS and _source(node) not in halves:
        return False
    if node.target is operator.getitem and not halves.issuperset(_together(node)):
        return False
    if node.target is aten.cat.default and not halves.issuperset(_past(node) or node.all_input_nodes):
        return False
    return all(_takes(user, node, halves, shown) for user in node.users)


def _together(node: fx.Node) -> Iterable[fx.Node]:
    """What lies in the same memory as a ``getitem``: the list that it is of, or the values of merged layers."""
    origin = kernels.output_of(node)
    if origin is None:
        return [_source(node)]
    return [other for (_, name), other in kernels.read_outputs(origin[0]).items() if name == "value"]


def _past(node: fx.Node) -> list[fx.Node]:
    """The cache that a concatenation of two values goes on from."""
    values = argument(node, "tensors")
    return [source for source in node.all_input_nodes if source.op == "placeholder" and len(values) == 2]


def _source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _takes(user: fx.Node, node: fx.Node, halves: set[fx.Node], shown: int) -> bool:
    """Whether ``user`` reads ``node`` as float16."""
    if user.op == "output":
        return node not in graph_results(user.graph)[:shown] or (node.target is aten.cat.default and bool(_past(node)))
    if user.target in VIEWS | PARTS:
        return user in halves
    if user.target is operator.getitem or user.target is aten.cat.default:
        return user in halves
    if user.target is aten.sym_size.int:
        return True
    if user.target is aten.linear.default:
        return LinearNode(user).x is node
    if user.target is _ATTENTION:
        call = AttentionNode(user)
        return node in (call.query, call.key, call.value) and node is not call.mask
    if user.target in _NORMS:
        return NormNode(user).x is node
    return user.target in _READ and _taken_by_kernel(user, node)


def _taken_by_kernel(kernel: fx.Node, node: fx.Node) -> bool:
    arguments = kernels.arguments(kernel)
    allowed = set(_READ[kernel.target])
    if _is_norm(node):
        allowed |= {"x", "residual"}
    elif kernel.target is kernels.fused_norm and arguments.get("residual") is None:
        allowed.add("x")
    return all(name in allowed for name, value in arguments.items() if value is node)


def _is_norm(node: fx.Node) -> bool:
    """Whether ``node`` is the result of a norm, or a view of one."""
    while node.target in VIEWS:
        node = _source(node)
    origin = kernels.output_of(node)
    return node.target in _NORMS or (origin is not None and origin[0].target is kernels.fused_norm)


def typed(program: Program, activations: str) -> Program:
    """The program with the types that its inputs and outputs have where activations are of this dtype."""
    halves = half_values(program) if activations == HALF else frozenset()
    places = program.graph.find_nodes(op="placeholder")
    outputs = graph_results(program.graph)
    return replace(
        program,
        inputs=tuple(_narrow(spec, node in halves) for spec, node in zip(program.inputs, places, strict=True)),
        outputs=tuple(_narrow(spec, node in halves) for spec, node in zip(program.outputs, outputs, strict=True)),
    )


def _narrow(spec: ValueSpec, half: bool) -> ValueSpec:
    return ValueSpec(spec.name, spec.type.with_dtype(torch.float16)) if half else spec


def check_range(program: Program, batches: Iterable[Batch]) -> None:
    """See that float16 holds all that becomes float16 while ``batches`` are run.

    Raises:
        BitlowerError: it does not; the value and its module are named.
    """
    read = {LinearNode(node).x for node in program.graph.nodes if node.target is aten.linear.default}
    read |= {kernels.arguments(node)["x"] for node in program.graph.nodes if node.target is kernels.fused_linear}
    observe(program, half_values(program) | read, batches, _fits)


def _fits(node: fx.Node, value: Any, batch: Batch) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return
    largest = float(value.nan_to_num(0.0, 0.0, 0.0).abs().max())
    if largest > LARGEST:
        where = f" in {node.meta['path']}" if node.meta.get("path") else ""
        raise BitlowerError(
            f"%{node.name}{where} reaches {largest:.3g}, and float16 ends at {LARGEST:g}",
            hint="say `activations: float32`",
        )
