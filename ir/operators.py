"""Operators with names: the table of those that passes work on, and typed views of their nodes.

An argument is found by its name in the operator's schema, wherever it stands; one that is left out is what the schema
takes for it. A view gives the operands of one kind of operator the same names, whatever each schema calls them. To let
another operator count as a linear layer, a norm, a product … add a row to :data:`OPERATORS` (see docs/operators.md).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Args:
        target: the operator.
        kind: ``linear``, ``convolution``, ``product``, ``attention``, ``softmax``, ``norm``, ``embedding`` or ``sum``.
        operands: what the schema calls each operand of the kind's view.
        parameter: the operand that is a parameter; empty if none is.
        role: the role of that parameter, of :data:`~bitlower.ir.quantization.scheme.WEIGHT_ROLES`.
    """

    target: Any
    kind: str
    operands: Mapping[str, str] = field(default_factory=dict)
    parameter: str = ""
    role: str = ""


_NORM = {"x": "input", "weight": "weight", "bias": "bias", "epsilon": "eps"}
_LINEAR, _TABLE, _GAMMA = ("weight", "linear-weight"), ("table", "embedding-table"), ("weight", "norm-weight")
_CONVOLUTION = {"x": "input", "weight": "weight", "bias": "bias"}
_KERNEL = ("weight", "convolution-weight")
OPERATORS = (
    Operator(aten.linear.default, "linear", {"x": "input", "weight": "weight", "bias": "bias"}, *_LINEAR),
    Operator(aten.addmm.default, "linear", {"x": "mat1", "weight": "mat2", "bias": "self"}, *_LINEAR),
    Operator(aten.conv1d.default, "convolution", _CONVOLUTION, *_KERNEL),
    Operator(aten.conv1d.padding, "convolution", _CONVOLUTION, *_KERNEL),
    Operator(aten.conv2d.default, "convolution", _CONVOLUTION, *_KERNEL),
    Operator(aten.conv2d.padding, "convolution", _CONVOLUTION, *_KERNEL),
    Operator(aten.embedding.default, "embedding", {"table": "weight", "ids": "indices"}, *_TABLE),
    Operator(aten.layer_norm.default, "norm", _NORM, *_GAMMA),
    Operator(aten.native_layer_norm.default, "norm", _NORM, *_GAMMA),
    Operator(aten.rms_norm.default, "norm", {"x": "input", "weight": "weight", "epsilon": "eps"}, *_GAMMA),
    Operator(aten.matmul.default, "product", {"left": "self", "right": "other"}),
    Operator(aten.bmm.default, "product", {"left": "self", "right": "mat2"}),
    Operator(aten.mm.default, "product", {"left": "self", "right": "mat2"}),
    Operator(
        aten.scaled_dot_product_attention.default,
        "attention",
        {"query": "query", "key": "key", "value": "value", "mask": "attn_mask"},
    ),
    Operator(aten.softmax.int, "softmax", {"x": "self"}),
    Operator(aten._softmax.default, "softmax", {"x": "self"}),
    Operator(aten._safe_softmax.default, "softmax", {"x": "self"}),
    Operator(aten.add.Tensor, "sum", {"left": "self", "right": "other"}),
    Operator(aten.add_.Tensor, "sum", {"left": "self", "right": "other"}),
)
ROWS = {row.target: row for row in OPERATORS}
"""The rows by operator."""
_WITHOUT_SCHEMA: dict[Any, dict[str, tuple[int, Any]]] = {operator.getitem: {"source": (0, None), "index": (1, None)}}


def operators_of(kind: str) -> frozenset[Any]:
    """The operators of a kind."""
    return frozenset(row.target for row in OPERATORS if row.kind == kind)


@functools.cache
def parameters(target: Any) -> dict[str, tuple[int, Any]]:
    """The arguments that ``target`` takes, in order: name, place, and what it is if it is left out."""
    if target in _WITHOUT_SCHEMA:
        return _WITHOUT_SCHEMA[target]
    arguments = target._schema.arguments
    return {argument.name: (place, argument.default_value) for place, argument in enumerate(arguments)}


def argument(node: fx.Node, name: str) -> Any:
    """The argument ``name`` of a call; what the operator takes for it where it is left out.

    Raises:
        KeyError: the operator has no such argument.
    """
    place, default = parameters(node.target)[name]
    if place < len(node.args):
        return node.args[place]
    return node.kwargs.get(name, default)


def operand(node: fx.Node, name: str) -> fx.Node:
    """The argument ``name`` of a call, which must be a node too."""
    value = argument(node, name)
    assert isinstance(value, fx.Node), f"the argument {name} of %{node.name} is no node"
    return value


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give a call another argument; those before it that were left out are written down."""
    known = parameters(node.target)
    place = known[name][0]
    if name in node.kwargs:
        node.update_kwarg(name, value)
        return
    args = [argument(node, other) for other, (at, _) in known.items() if at < max(place, len(node.args))]
    node.args = (*args[:place], value, *args[place + 1 :])


def further_arguments(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a call that stand behind the first."""
    _, *others = node.args
    return tuple(others)


def value_operands(node: fx.Node) -> list[fx.Node]:
    """The nodes that an elementwise operator of two operands joins; a number is none of them."""
    joined = (argument(node, name) for name in ("self", "other"))
    return [value for value in joined if isinstance(value, fx.Node)]


def swapped_axes(node: fx.Node) -> frozenset[int]:
    """The two axes that a transpose swaps, counted from the first; none where ``node`` is no transpose."""
    if node.target is not aten.transpose.int:
        return frozenset()
    return frozenset(argument(node, name) % node.meta["type"].rank for name in ("dim0", "dim1"))


def graph_results(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """What ``graph`` gives out, in order."""
    results: Any = graph.output_node().args[0]
    return tuple(results)


def set_graph_results(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Let ``graph`` give out ``nodes``."""
    graph.output_node().args = (tuple(nodes),)


@dataclass(frozen=True)
class NodeView:
    """A node of one kind of operator; its operands are properties."""

    node: fx.Node

    def argument(self, name: str) -> Any:
        """The operand ``name`` of the view; None if the operator has none such, or it is left out."""
        names = ROWS[self.node.target].operands
        return argument(self.node, names[name]) if name in names else None

    def operand(self, name: str) -> fx.Node:
        """The operand ``name`` of the view, which must be a node."""
        return operand(self.node, ROWS[self.node.target].operands[name])

    def optional(self, name: str) -> fx.Node | None:
        """The operand ``name`` of the view if it is a node; None if it is left out."""
        value = self.argument(name)
        return value if isinstance(value, fx.Node) else None

    def set(self, name: str, value: fx.Node | None) -> None:
        """Give the node another operand ``name``."""
        set_argument(self.node, ROWS[self.node.target].operands[name], value)


class WeightedNode(NodeView):
    """An activation times a weight, plus a bias."""

    @property
    def x(self) -> fx.Node:
        """The activation."""
        return self.operand("x")

    @property
    def weight(self) -> fx.Node:
        """The weight: a parameter, or the quantizer over one."""
        return self.operand("weight")

    @property
    def bias(self) -> fx.Node | None:
        """The bias; None if there is none."""
        return self.optional("bias")


class LinearNode(WeightedNode):
    """A linear layer: ``x · weightᵀ + bias``, or ``x · weight + bias`` for ``addmm``."""

    @property
    def stored_bias(self) -> str | None:
        """The name of the tensor that is the bias; None if there is none, or one that is computed."""
        return str(self.bias.target) if self.bias is not None and self.bias.op == "get_attr" else None


class ConvNode(WeightedNode):
    """A convolution of ``x`` ``[batch, channels, …]`` with ``weight`` ``[out, channels/groups, …]``, plus ``bias``."""

    @property
    def has_batch(self) -> bool:
        """Whether the input has a first axis over which the convolution is repeated."""
        return len(self.x.meta["type"].shape) == len(self.kernel) + 2

    @property
    def kernel(self) -> tuple[int, ...]:
        """How many entries the kernel has along each axis that it slides along."""
        return tuple(self.weight.meta["type"].shape[2:])

    @property
    def stride(self) -> tuple[int, ...]:
        """Entries from one place of the kernel to the next, along each axis."""
        return self._per_axis(argument(self.node, "stride"))

    @property
    def dilation(self) -> tuple[int, ...]:
        """Entries from one of the kernel's to the next, along each axis."""
        return self._per_axis(argument(self.node, "dilation"))

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """How many zeros stand before and behind the input, along each axis."""
        padding = argument(self.node, "padding")
        if padding == "same":
            missing = [step * (size - 1) for step, size in zip(self.dilation, self.kernel, strict=True)]
            return tuple((count // 2, count - count // 2) for count in missing)
        counts = self._per_axis([0] if padding == "valid" else padding)
        return tuple((count, count) for count in counts)

    @property
    def is_padded(self) -> bool:
        """Whether zeros stand around the input."""
        return any(sum(pair) for pair in self.padding)

    @property
    def groups(self) -> int:
        """How many convolutions of a part of the channels stand side by side."""
        return int(argument(self.node, "groups"))

    def _per_axis(self, values: Sequence[int]) -> tuple[int, ...]:
        """What is said once goes for all axes."""
        return tuple(values) * len(self.kernel) if len(values) == 1 else tuple(values)


class EmbeddingNode(NodeView):
    """A lookup of rows of a table."""

    @property
    def table(self) -> fx.Node:
        """The table: a parameter, or the quantizer over one."""
        return self.operand("table")

    @property
    def ids(self) -> fx.Node:
        """The numbers of the rows."""
        return self.operand("ids")


class NormNode(NodeView):
    """LayerNorm or RMSNorm."""

    @property
    def x(self) -> fx.Node:
        """The value that is normalized."""
        return self.operand("x")

    @property
    def weight(self) -> fx.Node | None:
        """What the normalized value is multiplied with; None if nothing."""
        return self.optional("weight")

    @property
    def bias(self) -> fx.Node | None:
        """What is added then; None if nothing."""
        return self.optional("bias")

    @property
    def epsilon(self) -> float | None:
        """What is added to the variance or mean square; None: the smallest number of the dtype."""
        value: float | None = self.argument("epsilon")
        return value

    @property
    def is_rms(self) -> bool:
        """Whether it takes no mean off."""
        return self.node.target is aten.rms_norm.default


class BinaryNode(NodeView):
    """A product of matrices, or a sum of values."""

    @property
    def left(self) -> fx.Node:
        """The first operand."""
        return self.operand("left")

    @property
    def right(self) -> Any:
        """The second operand: a node, or the number of a sum."""
        return self.argument("right")


class AttentionNode(NodeView):
    """``softmax(scale · QKᵀ + mask) V`` as one operator, over ``[batch, heads, length, head_dim]``."""

    @property
    def query(self) -> fx.Node:
        """Q."""
        return self.operand("query")

    @property
    def key(self) -> fx.Node:
        """K; with ``enable_gqa`` it may have fewer heads than Q."""
        return self.operand("key")

    @property
    def value(self) -> fx.Node:
        """V."""
        return self.operand("value")

    @property
    def mask(self) -> fx.Node | None:
        """The mask, bool or added to scores; None if there is none."""
        return self.optional("mask")

    @property
    def has_dropout(self) -> bool:
        """Whether probabilities are dropped at random."""
        return bool(argument(self.node, "dropout_p"))

    @property
    def is_causal(self) -> bool:
        """Whether no query sees a later key."""
        return bool(argument(self.node, "is_causal"))

    @property
    def scale(self) -> float | None:
        """What scores are multiplied with; None where it depends on a symbolic width."""
        factor, width = argument(self.node, "scale"), self.query.meta["type"].shape[-1]
        if factor is not None:
            return float(factor)
        return 1 / math.sqrt(width) if isinstance(width, int) else None
